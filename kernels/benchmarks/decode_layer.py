"""A decode step's layer: what LoRA adds to the base's seven products, all in one CUDA graph.

Marks for the time added, in microseconds: 35 for 32 rows of 32 adapters, 16 for 32 rows of one, 14 for one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ours
import plots
import torch
from rivals import RIVALS, Rival, attempt
from shapes import LAYER, Batch, Group, layer, layer_xs
from timing import REPEATS, WARM, added, capture, read_floor
from torch import Tensor

from lorakit.bench.harness import save, show, statistics_of

RANK, LAYERS = 16, 8
# (rows, adapters, mark); without an adapter only the launches are left
CASES = ((32, 32, 35.0), (32, 1, 16.0), (1, 1, 14.0), (8, 8, None), (16, 16, None), (64, 64, None), (32, 0, None))
CHAINED, SIDE = "lorakit, chained", "lorakit, side stream"

Work = Callable[[], None]


def run(folder: Path) -> None:
    results: dict[str, Any] = {}
    for rows, adapters, mark in CASES:
        results[case_name(rows, adapters)] = measure(rows, adapters) | {"mark_us": mark}
        torch.cuda.empty_cache()
    setting = {
        "layer": [[shape.in_features, shape.outs] for shape in LAYER],
        "dtype": "bfloat16",
        "rank": RANK,
        "layers_in_a_graph": LAYERS,
        "repeats": REPEATS,
        "warm": WARM,
        "order": "a replay with LoRA, then one of the base alone; each pair gives one difference",
    }
    path = save("kernels_decode_layer", folder, setting, results)
    plot(results, path.with_suffix(".png"))
    table = [
        [case, name, *plots.three(values), "-" if result["mark_us"] is None else f"{result['mark_us']:g}"]
        for case, result in results.items()
        for name, values in result["added_us"].items()
        if values
    ]
    show("Decode: time added to a layer, us", ["case", "by", "min", "median", "max", "mark"], table, path)
    for case, result in results.items():
        base, floors = result["base_us"], result["read_floors_us"]
        print(
            f"{case}: base {base['min']:.1f} to {base['max']:.1f} us; "
            f"A and B are {result['bytes'] / 1e6:.1f} MB, four reads {sum(floors):.1f} us"
        )


def case_name(rows: int, adapters: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}, {adapters} adapter{'s' * (adapters != 1)}"


def measure(rows: int, adapters: int) -> dict[str, Any]:
    batch = Batch(tuple(i % adapters if adapters else -1 for i in range(rows)))
    ranks = [RANK] * adapters
    layers = [layer(ranks or [RANK]) for _ in range(LAYERS)]
    xs = layer_xs(batch)
    base = capture(base_work(layers, xs))
    times: dict[str, list[float] | None] = {
        CHAINED: added(chained_work(layers, xs, batch), base, LAYERS),
        SIDE: added(side_work(layers, xs, batch), base, LAYERS),
    }
    for name, rival in RIVALS.items():
        work = chained_work(layers, xs, batch, rival)
        times[name] = attempt(name, partial(added, work, base, LAYERS)) if adapters else None
    sizes = [shape.bytes(ranks) for shape in LAYER]
    return {
        "base_us": statistics_of([base.replay() / LAYERS for _ in range(REPEATS)]),
        "added_us": {name: values and statistics_of(values) for name, values in times.items()},
        "bytes": sum(sizes),
        "read_floors_us": [read_floor(size) for size in sizes if size],
    }


def base_work(layers: Sequence[Sequence[Group]], xs: Sequence[Tensor]) -> Work:
    def work() -> None:
        for groups in layers:
            for group, x in zip(groups, xs, strict=True):
                group.products(x)

    return work


def chained_work(
    layers: Sequence[Sequence[Group]], xs: Sequence[Tensor], batch: Batch, apply: Rival = ours.chained
) -> Work:
    """The base's products, then LoRA, in one stream."""

    def work() -> None:
        for groups in layers:
            for group, x in zip(groups, xs, strict=True):
                apply(group, x, group.products(x), batch)

    return work


def side_work(layers: Sequence[Sequence[Group]], xs: Sequence[Tensor], batch: Batch) -> Work:
    """The first launch on a stream of its own, beside the base's products."""
    side = torch.cuda.Stream()

    def work() -> None:
        main = torch.cuda.current_stream()
        for groups in layers:
            for group, x in zip(groups, xs, strict=True):
                side.wait_stream(main)
                ys = group.products(x)
                with torch.cuda.stream(side):
                    h = ours.sums(group, x, batch)
                main.wait_stream(side)
                ours.add(group, ys, h, batch)

    return work


def plot(results: dict[str, Any], path: Path) -> None:
    cases = list(results)
    series = {
        name: [(results[case]["added_us"][name] or {}).get("median") for case in cases]
        for name in results[cases[0]]["added_us"]
    }
    marks = [results[case]["mark_us"] for case in cases]
    plots.bars(path, cases, series, "time added to a layer, µs (median)", marks=marks, log=True)
