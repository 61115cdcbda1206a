"""A prompt's layer: what LoRA adds to the base's seven products for 8,192 tokens of 8 adapters. The mark is 18 %."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import ours
import plots
import torch
from decode_layer import base_work, chained_work
from rivals import RIVALS, attempt
from shapes import LAYER, Batch, Group, layer, layer_xs
from timing import WARM, added, capture
from torch import Tensor

from lorakit.bench.harness import save, show, statistics_of

ROWS, TOKENS_PER_ROW, RANKS, REPEATS, MARK = 8, 1024, (16, 64), 15, 18.0
OURS, DELTA_FIRST = "lorakit", "lorakit, delta first"


def run(folder: Path) -> None:
    results: dict[str, Any] = {}
    for rank in RANKS:
        results[f"rank {rank}"] = measure(rank)
        torch.cuda.empty_cache()
    setting = {
        "layer": [[shape.in_features, shape.outs] for shape in LAYER],
        "dtype": "bfloat16",
        "rows": ROWS,
        "tokens_per_row": TOKENS_PER_ROW,
        "adapters": ROWS,
        "mark_percent": MARK,
        "delta first": "expand_ into zeros, then the base's product accumulates onto them",
        "repeats": REPEATS,
        "warm": WARM,
        "order": "a replay with LoRA, then one of the base alone; each pair gives one difference",
    }
    path = save("kernels_prefill_layer", folder, setting, results)
    plot(results, path.with_suffix(".png"))
    table = [
        [case, name, *plots.three(values), f"{result['added_percent'][name]:.1f} %"]
        for case, result in results.items()
        for name, values in result["added_us"].items()
        if values
    ]
    show("Prefill: time added to a layer, us", ["case", "by", "min", "median", "max", "of the base"], table, path)
    for case, result in results.items():
        print(f"{case}: base {result['base_us']['median']:.0f} us; mark {MARK:g} %")


def measure(rank: int) -> dict[str, Any]:
    batch = Batch(tuple(range(ROWS)), TOKENS_PER_ROW)
    layers, xs = [layer([rank] * ROWS)], layer_xs(batch)
    base = capture(base_work(layers, xs))

    def first() -> None:
        for group, x in zip(layers[0], xs, strict=True):
            delta_first(group, x, batch)

    times: dict[str, list[float] | None] = {
        OURS: added(chained_work(layers, xs, batch), base, repeats=REPEATS),
        DELTA_FIRST: added(first, base, repeats=REPEATS),
    }
    for name, rival in RIVALS.items():
        work = chained_work(layers, xs, batch, rival)
        times[name] = attempt(name, partial(added, work, base, repeats=REPEATS))
        torch.cuda.empty_cache()
    base_us = statistics_of([base.replay() for _ in range(REPEATS)])
    added_us = {name: values and statistics_of(values) for name, values in times.items()}
    percent = {name: values and 100 * values["median"] / base_us["median"] for name, values in added_us.items()}
    return {"base_us": base_us, "added_us": added_us, "added_percent": percent}


def delta_first(group: Group, x: Tensor, batch: Batch) -> list[Tensor]:
    """LoRA's share into zeros, then the base's product added by the product itself."""
    ys = [x.new_zeros(batch.tokens, out) for out in group.shape.outs]
    ours.chained(group, x, ys, batch)
    for y, weight in zip(ys, group.weights, strict=True):
        y.addmm_(x, weight.T)
    return ys


def plot(results: dict[str, Any], path: Path) -> None:
    cases = list(results)
    series = {name: [results[case]["added_percent"][name] for case in cases] for name in results[cases[0]]["added_us"]}
    plots.bars(path, cases, series, "time added to a layer, % of the base (median)", marks=[MARK] * len(cases))
