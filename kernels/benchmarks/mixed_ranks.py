"""Ranks mixed in one batch: the time follows the bytes of the factors, not the rows times the largest rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ours
import plots
import torch
from shapes import LAYER, Batch, layer, layer_xs
from timing import REPEATS, WARM, alone

from lorakit.bench.harness import save, show, statistics_of

ROWS, LAYERS, ROUNDS = 32, 4, 2
MOST = 128
RANKS = (8, 16, 32, 64, MOST)
# Name → (the rows' ranks, the room for ranks).
CASES = {f"all {rank}": ([rank] * ROWS, 0) for rank in RANKS} | {
    f"all 8, room for {MOST}": ([8] * ROWS, MOST),
    "mixed": ([RANKS[i % len(RANKS)] for i in range(ROWS)], 0),
}


def run(folder: Path) -> None:
    results: dict[str, Any] = {}
    for name, (ranks, room) in CASES.items():
        results[name] = measure(ranks, room)
        torch.cuda.empty_cache()
    fit = summary(results)
    setting = {
        "layer": [[shape.in_features, shape.outs] for shape in LAYER],
        "dtype": "bfloat16",
        "rows": ROWS,
        "adapters": ROWS,
        "mixed_ranks": CASES["mixed"][0],
        "what": "both launches of a layer's four groups, without the base",
        "repeats": REPEATS,
        "warm": WARM,
    }
    path = save("kernels_mixed_ranks", folder, setting, {"cases": results, "fit": fit})
    plot(results, fit, path.with_suffix(".png"))
    table = [
        [name, f"{r['megabytes']:.1f}", *plots.three(r["us"]), f"{r['us']['median'] / r['megabytes']:.3f}"]
        for name, r in results.items()
    ]
    show("Mixed ranks, a layer", ["ranks", "MB", "min us", "median us", "max us", "us a MB"], table, path)
    print(
        f"fit of the uniform ranks: {fit['us']:.1f} us + {fit['us_a_megabyte']:.3f} us a MB; "
        f"mixed takes {fit['mixed_to_fit']:.2f} of it, and {fit['mixed_to_largest']:.2f} of all {MOST}"
        f" at {fit['mixed_to_largest_bytes']:.2f} of the bytes"
    )


def measure(ranks: Sequence[int], room: int) -> dict[str, Any]:
    batch = Batch(tuple(range(len(ranks))))
    layers = [layer(ranks, base=False, max_rank=room) for _ in range(LAYERS)]
    xs = layer_xs(batch)
    ys = [[batch.x(out) for out in shape.outs] for shape in LAYER]

    def work() -> None:
        for _ in range(ROUNDS):
            for groups in layers:
                for group, x, outs in zip(groups, xs, ys, strict=True):
                    ours.chained(group, x, outs, batch)

    times = alone(work, ROUNDS * LAYERS)
    return {"megabytes": sum(shape.bytes(ranks) for shape in LAYER) / 1e6, "us": statistics_of(times)}


def summary(results: dict[str, Any]) -> dict[str, float]:
    """A line through the uniform ranks, and where the mixed ones lie beside it."""
    uniform = [results[f"all {rank}"] for rank in RANKS]
    slope, constant = statistics.linear_regression(
        [r["megabytes"] for r in uniform], [r["us"]["median"] for r in uniform]
    )
    mixed, largest = results["mixed"], uniform[-1]
    return {
        "us": constant,
        "us_a_megabyte": slope,
        "mixed_to_fit": mixed["us"]["median"] / (constant + slope * mixed["megabytes"]),
        "mixed_to_largest": mixed["us"]["median"] / largest["us"]["median"],
        "mixed_to_largest_bytes": mixed["megabytes"] / largest["megabytes"],
    }


def plot(results: dict[str, Any], fit: dict[str, float], path: Path) -> None:
    points = {name: (r["megabytes"], r["us"]["median"]) for name, r in results.items()}
    plots.points(path, points, (fit["us"], fit["us_a_megabyte"]), "mixed", "A and B of a layer, MB", "µs (median)")
