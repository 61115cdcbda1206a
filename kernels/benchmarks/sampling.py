"""A token for each row: without sorting the vocabulary, by lorakit's kernel, and by sorting, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plots
import torch
from timing import REPEATS, WARM, alone
from torch import Tensor

from lorakit.bench.harness import save, show, statistics_of
from lorakit.engine.sampling import Settings, by_sorting, draw, rows_of, sample

ROWS = (1, 8, 32, 64, 256)
VOCABULARIES = (32_000, 128_256)
TEMPERATURE, SPREAD, PEAK = 0.7, 2.5, 14.0
CUTS = {"all tokens": (0, 1.0), "top-p 0.9": (0, 0.9), "top-k 20, top-p 0.8": (20, 0.8)}
LAUNCHES = 8


def run(folder: Path) -> None:
    results = dict(_measured())
    setting = {
        "logits": f"normal, of standard deviation {SPREAD}, and three tokens from {PEAK} on, 1 apart; fp32",
        "flat": "of standard deviation 1, without the three, at temperature 1: 0.9 takes more than half of all tokens",
        "temperature": TEMPERATURE,
        "launches": LAUNCHES,
        "repeats": REPEATS,
        "warm": WARM,
    }
    path = save("kernels_sampling", folder, setting, results)
    columns = ["rows", "min us", "median us", "max us", "by sorting, median us"]
    rows = [
        [name, *plots.three(found["us"]["lorakit"]), f"{found['us']['sorting']['median']:.1f}"]
        for name, found in results.items()
    ]
    show("A token for each row", columns, rows, path)


def _measured() -> Iterator[tuple[str, dict[str, Any]]]:
    for size in VOCABULARIES:
        for count in ROWS:
            for name, cut in CUTS.items():
                yield f"{count} of {size:,}, {name}", _times(_logits(count, size), TEMPERATURE, cut)
    for size in VOCABULARIES:
        logits = torch.randn(64, size, device="cuda")
        yield f"64 of {size:,}, top-p 0.9, flat", _times(logits, 1.0, CUTS["top-p 0.9"])


def _logits(count: int, size: int) -> Tensor:
    logits = SPREAD * torch.randn(count, size, device="cuda")
    places = torch.randint(size, (count, 3), device="cuda")
    return logits.scatter_(1, places, PEAK - torch.arange(3.0, device="cuda").expand(count, -1))


def _times(logits: Tensor, temperature: float, cut: tuple[int, float]) -> dict[str, Any]:
    settings = [Settings(temperature, *cut, draw("benchmark", row)) for row in range(len(logits))]
    rows, cuts = rows_of(settings).cuda(), cut != CUTS["all tokens"]
    us = {}
    for name, function in {"lorakit": sample, "sorting": by_sorting}.items():

        def work(function: Any = function) -> None:
            for _ in range(LAUNCHES):
                function(logits, rows, cuts=cuts)

        us[name] = statistics_of(alone(work, LAUNCHES))
    return {"us": us}
