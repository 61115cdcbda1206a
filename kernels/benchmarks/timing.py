"""How time is measured: CUDA graphs, replayed in turn, over more weights than the second-level cache holds.

Every time is in microseconds of the GPU's own clock. A time that LoRA adds is a difference of pairs: the graph of the
base with LoRA and the graph of the base alone are replayed one after the other, and each pair gives one difference.
What slows the GPU for a moment slows both of a pair.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lorakit_kernels.arguments import launch

REPEATS = 25
WARM = 5
COLD_BYTES = 150_000_000
"""What rotates is this much at least, three times the second-level cache of an H100."""
LAUNCHES = 32
"""A graph holds so many launches at least, so that its own start weighs little."""

Work = Callable[[], object]


def need_gpu() -> None:
    """Ends the program where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("These benchmarks measure a CUDA device, and there is none here.")


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured graph, and the work that it was captured from: the tensors that the work holds must outlive it."""

    graph: torch.cuda.CUDAGraph
    work: Work

    def replay(self) -> float:
        """Microseconds of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def capture(work: Work) -> Graph:
    """Runs work twice, which compiles what it needs, then captures it.

    Raises:
        RuntimeError: it waits for the device, so no graph can hold it.
    """
    work()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return Graph(graph, work)


def alone(work: Work, parts: int = 1, repeats: int = REPEATS) -> list[float]:
    """Times a graph of work.

    Args:
        work: what to time.
        parts: what each time is divided by: how often the work does the same.
        repeats: replays, after some to warm up.
    """
    graph = capture(work)
    for _ in range(WARM):
        graph.replay()
    return [graph.replay() / parts for _ in range(repeats)]


def added(work: Work, base: Graph, parts: int = 1, repeats: int = REPEATS) -> list[float]:
    """Times what work takes longer than the base, pair by pair; arguments as in `alone`."""
    graph = capture(work)
    for _ in range(WARM):
        graph.replay()
        base.replay()
    return [(graph.replay() - base.replay()) / parts for _ in range(repeats)]


def sets(size: int) -> int:
    """How many sets of so many bytes must rotate so that none is in the cache when its turn comes."""
    return max(2, -(-COLD_BYTES // size))


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of the best replay of out = source + 1 on 1 GiB."""
    source = torch.zeros(1 << 28, device="cuda", dtype=torch.float32)
    out = torch.empty_like(source)

    def work() -> None:
        for _ in range(4):
            torch.add(source, 1.0, out=out)

    return 2 * source.nbytes / min(alone(work, 4, 10))


@triton.jit
def _read_kernel(source, sums, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(values, axis=0))


@functools.cache
def read_floor(size: int) -> float:
    """Microseconds of a kernel that reads so many contiguous bytes from beyond the cache, and does nothing else.

    The best of a few tile sizes, each by its median, in a graph of such kernels.
    """
    count = -(-size // 64) * 16
    regions = torch.zeros(sets(size), count, device="cuda", dtype=torch.int32)
    rounds = -(-LAUNCHES // len(regions))
    times = []
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8)):
        grid = (triton.cdiv(count, block),)
        sums = torch.empty(grid, device="cuda", dtype=torch.int32)

        def work(block: int = block, warps: int = warps, grid: tuple[int] = grid, sums: torch.Tensor = sums) -> None:
            for _ in range(rounds):
                for region in regions.unbind():
                    _read_kernel[grid](region, sums, count, BLOCK=block, num_warps=warps)

        times.append(median(alone(work, rounds * len(regions), 10)))
    return min(times)


@triton.jit
def _touch_kernel(places, values, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.load(places + tl.program_id(0))
    tl.store(values + at, tl.load(values + at) + 1)


@functools.cache
def launch_floor() -> float:
    """Microseconds of two tiny kernels, each of which needs what the one before it wrote.

    Launched as the operators are: where the GPU can, before the kernel ahead has ended.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    places = torch.arange(programs, device=device, dtype=torch.int32)
    values = torch.zeros_like(places)

    def work() -> None:
        for _ in range(64):
            launch(_touch_kernel, (programs,), places, values, device=device)

    return median(alone(work, 32))
