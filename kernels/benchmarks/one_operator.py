"""One module, 4096 → 11008, every row with an adapter of its own: both launches against what memory allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ours
import plots
import torch
from rivals import RIVALS, Rival, attempt
from shapes import Batch, Group, Shape
from timing import LAUNCHES, REPEATS, WARM, alone, copy_bandwidth, launch_floor, median, read_floor, sets

from lorakit.bench.harness import save, show, statistics_of

SHAPE, RANK = Shape("one", 4096, (11008,)), 16
ROWS = (1, 2, 4, 8, 16, 32, 64)


def run(folder: Path) -> None:
    bandwidth, pair = copy_bandwidth(), launch_floor()
    results: dict[str, Any] = {}
    for rows in ROWS:
        results[str(rows)] = measure(rows, bandwidth, pair)
        torch.cuda.empty_cache()
    setting = {
        "in_and_out_features": [SHAPE.in_features, *SHAPE.outs],
        "dtype": "bfloat16",
        "rank": RANK,
        "adapters": "one a row",
        "copy_gb_per_s": bandwidth / 1e3,
        "launch_floor_us": pair,
        "bytes": "of A and B",
        "floor": "the larger of bytes / copy bandwidth and the launch floor",
        "repeats": REPEATS,
        "warm": WARM,
    }
    path = save("kernels_one_operator", folder, setting, results)
    plot(results, path.with_suffix(".png"))
    table = []
    for case, result in results.items():
        others = [values and values["median"] for values in list(result["us"].values())[1:]]
        table.append(
            [
                case,
                f"{result['bytes'] / 1e6:.1f}",
                f"{result['us']['lorakit']['median']:.2f}",
                f"{result['floor_us']:.2f}",
                f"{result['ratio_to_floor']:.2f}",
                f"{result['read_floor_us']:.2f}",
                *("-" if value is None else f"{value:.1f}" for value in others),
            ]
        )
    columns = ["rows", "MB", "lorakit us", "floor us", "ratio", "read us", *RIVALS]
    show("One module, a row an adapter", columns, table, path)
    print(f"copy {bandwidth / 1e3:.0f} GB/s; two dependent launches {pair:.2f} us")


def measure(rows: int, bandwidth: float, pair: float) -> dict[str, Any]:
    batch = Batch(tuple(range(rows)))
    size = SHAPE.bytes([RANK] * rows)
    groups = [Group(SHAPE, [RANK] * rows, base=False) for _ in range(sets(size))]
    rounds = -(-LAUNCHES // (2 * len(groups)))
    x = batch.x(SHAPE.in_features)
    ys = [[batch.x(SHAPE.outs[0])] for _ in groups]

    def work_of(apply: Rival) -> Callable[[], None]:
        def work() -> None:
            for _ in range(rounds):
                for group, y in zip(groups, ys, strict=True):
                    apply(group, x, y, batch)

        return work

    parts = rounds * len(groups)
    times: dict[str, list[float] | None] = {"lorakit": alone(work_of(ours.chained), parts)}
    for name, rival in RIVALS.items():
        times[name] = attempt(name, partial(alone, work_of(rival), parts, 10))
    floor = max(size / bandwidth, pair)
    return {
        "us": {name: values and statistics_of(values) for name, values in times.items()},
        "bytes": size,
        "sets": len(groups),
        "floor_us": floor,
        "read_floor_us": read_floor(size),
        "ratio_to_floor": median(times["lorakit"] or []) / floor,
    }


def plot(results: dict[str, Any], path: Path) -> None:
    rows = [int(key) for key in results]
    lines = {
        name: [(result["us"][name] or {}).get("median") for result in results.values()]
        for name in next(iter(results.values()))["us"]
    }
    lines["read floor"] = [result["read_floor_us"] for result in results.values()]
    lines["floor"] = [result["floor_us"] for result in results.values()]
    plots.lines(path, rows, lines, "rows, each with an adapter of its own", "4096 → 11008, µs (median)")
