"""A token for each row: by lorakit's kernels, and in plain torch, which sorts the vocabulary where rows are cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
CUTS = {"all tokens": (0, 1.0), "top-p 0.9": (0, 0.9), "top-k 64": (64, 1.0), "top-k 20, top-p 0.8": (20, 0.8)}
FLAT = (1, 8, 64)
LAUNCHES = 8

Times = tuple[dict[str, Any], dict[str, Any]]
"""Of the GPU and of the host: who → statistics, in microseconds."""


def run(folder: Path) -> None:
    results = dict(_measured())
    setting = {
        "logits": f"normal, of standard deviation {SPREAD}, and three tokens from {PEAK} on, 1 apart; fp32",
        "flat": "of standard deviation 1, without the three, at temperature 1: 0.9 takes more than half of all tokens",
        "temperature": TEMPERATURE,
        "us": "of the GPU, in a CUDA graph",
        "host_us": "until a call returns that nothing waits for, not in a graph",
        "launches": LAUNCHES,
        "repeats": REPEATS,
        "warm": WARM,
    }
    saved = {name: {"us": us, "host_us": host_us} for name, (us, host_us) in results.items()}
    path = save("kernels_sampling", folder, setting, saved)
    columns = ["rows", "min us", "median us", "max us", "plain torch", "host", "plain torch"]
    rows = [
        [name, *plots.three(us["lorakit"]), *(f"{one['median']:.1f}" for one in (us["torch"], *host_us.values()))]
        for name, (us, host_us) in results.items()
    ]
    show("A token for each row", columns, rows, path)


def _measured() -> Iterator[tuple[str, Times]]:
    for size in VOCABULARIES:
        for count in ROWS:
            for name, cut in CUTS.items():
                yield f"{count} of {size:,}, {name}", _times(_logits(count, size), TEMPERATURE, cut)
    for size in VOCABULARIES:
        for count in FLAT:
            logits = torch.randn(count, size, device="cuda")
            yield f"{count} of {size:,}, top-p 0.9, flat", _times(logits, 1.0, CUTS["top-p 0.9"])


def _logits(count: int, size: int) -> Tensor:
    logits = SPREAD * torch.randn(count, size, device="cuda")
    places = torch.randint(size, (count, 3), device="cuda")
    return logits.scatter_(1, places, PEAK - torch.arange(3.0, device="cuda").expand(count, -1))


def _times(logits: Tensor, temperature: float, cut: tuple[int, float]) -> Times:
    settings = [Settings(temperature, *cut, draw("benchmark", row)) for row in range(len(logits))]
    rows, cuts = rows_of(settings).cuda(), cut != CUTS["all tokens"]
    us, host_us = {}, {}
    for name, function in {"lorakit": sample, "torch": by_sorting}.items():

        def call(function: Any = function) -> None:
            function(logits, rows, cuts=cuts)

        def work(call: Callable[[], None] = call) -> None:
            for _ in range(LAUNCHES):
                call()

        us[name] = statistics_of(alone(work, LAUNCHES))
        host_us[name] = statistics_of(list(_host(call)))
    return us, host_us


def _host(call: Callable[[], None]) -> Iterator[float]:
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        yield 1e6 * (time.perf_counter() - start)
