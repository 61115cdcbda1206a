"""adapter-load: what it costs a GPU to bring an adapter in, and what the running step notices of it.

An adapter of a 7B Llama, rank 16 on all linear layers, bfloat16: 80 MB. It lies in pinned host memory, as it does after
its first load, and takes the place of another. The step beside it is the base's products of 32 layers
at batch 32, in a CUDA graph.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.layout import Extent
from lorakit.bench.harness import save, show, statistics_of
from lorakit.console import make_console
from lorakit.runtime.pool import AdapterPool, Slot

WIDTHS = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)} | {
    "gate": (4096, 11008),
    "up": (4096, 11008),
    "down": (11008, 4096),
}
LAYERS = 32
RANK = 16
BATCH = 32
RUNS = 30
NAMES = ("a", "b", "c")
"""Room is for two of them."""


def run(folder: Path) -> None:
    """Measures, prints and saves `adapter_load.json`; says so and does nothing where there is no GPU."""
    if not torch.cuda.is_available():
        make_console().print("adapter-load: left out, it measures copies to a GPU")
        return
    device = torch.device("cuda")
    extent = _adapter()
    pool = AdapterPool(device=device, capacity=2 * extent.nbytes)
    for _ in NAMES:
        _bring(pool, extent)
    loads = [_load(pool, extent) for _ in range(RUNS)]
    copies = [_copy(extent.nbytes, device) for _ in range(RUNS)]
    quiet, busy = _steps(pool, extent, device)
    results: dict[str, Any] = {
        "load_ms": statistics_of(loads),
        "bare_copy_ms": statistics_of(copies),
        "load_GB_per_s": statistics_of([extent.nbytes / load / 1e6 for load in loads]),
        "share_of_copy_bandwidth": min(copies) / statistics_of(loads)["median"],
        "step_alone_ms": statistics_of(quiet),
        "step_with_loads_ms": statistics_of(busy),
    }
    setting = {"nbytes": extent.nbytes, "rank": RANK, "layers": LAYERS, "batch": BATCH, "runs": RUNS}
    path = save("adapter_load", folder, setting, results)
    rows = [
        [name, *(f"{results[name][key]:.3f}" for key in ("min", "median", "max"))]
        for name in ("load_ms", "bare_copy_ms", "step_alone_ms", "step_with_loads_ms")
    ]
    show(f"An adapter of {extent.nbytes / 1e6:.1f} MB comes in", ["", "min", "median", "max"], rows, path)


def _adapter() -> Extent:
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    modules = {
        f"layers.{layer}.{name}": ModuleForm("linear", wide, out, weights(RANK, wide), weights(out, RANK))
        for layer in range(LAYERS)
        for name, (wide, out) in WIDTHS.items()
    }
    return Extent.of_form(AdapterForm("lora", modules, {}))


def _bring(pool: AdapterPool, extent: Extent) -> Slot:
    """Loads the one adapter that is not there, which takes the place of the least recently used."""
    name = next(name for name in NAMES if name not in pool)
    return pool.put(name, extent, name=name)


def _load(pool: AdapterPool, extent: Extent) -> float:
    """Milliseconds from asking for an adapter until it is there."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    pool.wait([_bring(pool, extent)])
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _copy(nbytes: int, device: torch.device) -> float:
    """Milliseconds of the same copy without a pool."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _steps(pool: AdapterPool, extent: Extent, device: torch.device) -> tuple[list[float], list[float]]:
    """Milliseconds of steps alone and of steps during which an adapter comes in, taken in turn."""
    bases = [
        (
            torch.randn(BATCH, wide, device=device, dtype=torch.bfloat16),
            torch.randn(out, wide, device=device).bfloat16(),
        )
        for _ in range(LAYERS)
        for wide, out in WIDTHS.values()
    ]

    def step() -> None:
        for x, weight in bases:
            torch.nn.functional.linear(x, weight)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    quiet: list[float] = []
    busy: list[float] = []
    for turn in range(2 * RUNS):
        graph.replay()
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        if turn % 2:
            # Not waited for: the step was launched without it.
            _bring(pool, extent)
        after.synchronize()
        torch.cuda.synchronize()
        (busy if turn % 2 else quiet).append(before.elapsed_time(after))
    return quiet, busy
