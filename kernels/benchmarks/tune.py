"""Finds the tile sizes of the GPU at hand, on the shapes of a Llama-2-7B layer, and writes its data file.

    python kernels/benchmarks/tune.py [--out FOLDER]

One stage after the other, each over a small grid around what is set so far. A candidate must be 1 % faster than the
best before it to take its place. Candidates are compiled ahead, in processes of their own; what does not compile, or
asks for more than the GPU has, is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import base_products
import paged_attention
import torch
from decode_layer import base_work, chained_work
from ours import with_tiles
from rivals import FAILURES
from shapes import LAYER, Batch, Group, Shape, layer, layer_xs
from timing import Graph, added, capture, median, need_gpu

from lorakit_kernels import tuning
from lorakit_kernels.tuning import Decode, Dense, Paged, Prefill, Tiles

Tile = TypeVar("Tile", Decode, Prefill, Dense, Paged)
RANK, REPEATS = 16, 11
WORKERS, WORKER_BYTES = 12, 4 << 30
CROSSOVER = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch to time: rows, the tokens of each, and the adapters that they share."""

    rows: int
    tokens_per_row: int
    adapters: int
    layers: int = 4


DENSE_TOKENS = (1, 8, 32)
DECODE = (Case(1, 1, 1), Case(8, 1, 8), Case(32, 1, 32), Case(32, 1, 1))
PREFILL = (Case(8, 1024, 8, layers=1),)
DECODE_STAGES: tuple[dict[str, tuple[int, ...]], ...] = (
    {"block_k": (256, 512, 1024), "shrink_warps": (2, 4, 8)},
    {"block_n": (128, 256, 512), "expand_warps": (1, 2, 4)},
)
PREFILL_STAGES: tuple[dict[str, tuple[int, ...]], ...] = (
    {"block_m": (16, 32, 64), "block_k": (64, 128)},
    {"split_k": (2048, 4096, 11264)},
    {"shrink_warps": (2, 4, 8), "shrink_stages": (2, 3, 4)},
    {"block_n": (64, 128, 256), "expand_warps": (2, 4, 8)},
    {"expand_steps": (1, 4, 8, 16), "expand_stages": (2, 3, 4)},
)


class Timer:
    """Times tiles on a case: the layer's weights and the base's graph are made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.batch = Batch(tuple(i % case.adapters for i in range(case.rows)), case.tokens_per_row)
        self.layers = [layer([RANK] * case.adapters) for _ in range(case.layers)]
        self.xs = layer_xs(self.batch)
        self.base: Graph = capture(base_work(self.layers, self.xs))

    def __call__(self, tile: Decode | Prefill) -> float:
        """Microseconds added to a layer, the median."""
        work = chained_work(self.layers, self.xs, self.batch, functools.partial(with_tiles, tile=tile))
        return median(added(work, self.base, self.case.layers, REPEATS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for a copy of the data file")
    options = parser.parse_args()
    need_gpu()
    started = time.perf_counter()
    torch.manual_seed(0)
    folder = Path(tuning.__file__).parent / "tuning_data"
    start = tuning.read(folder / "fallback.json")
    workers = min(WORKERS, (os.cpu_count() or 2) - 1, torch.cuda.mem_get_info()[0] // WORKER_BYTES)
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("spawn")) as pool:
        decode = tuned(pool, start.decode, DECODE_STAGES, DECODE)
        prefill = tuned(pool, start.prefill, PREFILL_STAGES, PREFILL)
        tiles = Tiles(
            decode_tokens=crossover(pool, decode, prefill),
            decode=decode,
            prefill=prefill,
            prefill_wide=start.prefill_wide,
            dense=dense(pool),
            **attention(pool),
        )
    name = tuning.file_name(torch.cuda.get_device_name())
    for path in [folder / name] + ([options.out / name] if options.out else []):
        path.parent.mkdir(parents=True, exist_ok=True)
        tuning.write(path, tiles)
        print(f"wrote {path}")
    print((folder / name).read_text(encoding="utf-8"), end="")
    print(f"{time.perf_counter() - started:.0f} s")


def tuned(pool: Executor, tile: Tile, stages: Sequence[dict[str, tuple[int, ...]]], cases: Sequence[Case]) -> Tile:
    """The best tile sizes for the sum of some cases."""
    timers = [Timer(case) for case in cases]
    for stage in stages:
        candidates = list(grid(tile, stage))
        compile_ahead(pool, candidates, cases)
        tile = fastest(candidates, functools.partial(together, timers), list(stage))
    return tile


def dense(pool: Executor) -> Dense | None:
    """The best tiles for the base's own products of siblings, and for how many tokens they beat cuBLAS's."""
    grid = product((32, 64, 128), (64, 128), (4, 8), (3, 4, 6))
    candidates = [Dense(max(base_products.TOKENS), *sizes) for sizes in grid]
    list(pool.map(base_products.compile_joined, candidates))
    names = [field.name for field in dataclasses.fields(Dense)][1:]
    best = fastest(candidates, lambda tile: sum(base_products.joined(tokens, tile) for tokens in DENSE_TOKENS), names)
    most = 0
    for tokens in base_products.TOKENS:
        us = base_products.joined(tokens, best), base_products.apart(tokens)
        print(f"{tokens} tokens: joined {us[0]:.2f} us, apart {us[1]:.2f} us", flush=True)
        if us[0] > us[1]:
            break
        most = tokens
    return dataclasses.replace(best, tokens=most) if most else None


def attention(pool: Executor) -> dict[str, Paged]:
    """The best tiles for attention over a paged cache, for few programs and for many."""
    candidates = [Paged(*sizes) for sizes in product((32, 64, 128), (1, 2, 4, 8), (2, 3, 4))]
    list(pool.map(paged_attention.compile_tile, candidates))
    names = [field.name for field in dataclasses.fields(Paged)]
    found = {}
    for name, cases in (("paged", paged_attention.FEW), ("paged_many", paged_attention.MANY)):
        batches = [paged_attention.Batch(case) for case in cases]
        found[name] = fastest(candidates, lambda tile, batches=batches: paged_attention.cost(tile, batches), names)
    return found


def together(timers: Sequence[Timer], tile: Decode | Prefill) -> float:
    return sum(timer(tile) for timer in timers)


def grid(tile: Tile, stage: dict[str, tuple[int, ...]]) -> Iterator[Tile]:
    """The tile as it is, then every other of a stage's that may be."""
    yield tile
    for values in product(*stage.values()):
        other = dataclasses.replace(tile, **dict(zip(stage, values, strict=True)))
        if other != tile and (not isinstance(other, Prefill) or other.split_k % other.block_k == 0):
            yield other


def fastest(candidates: Iterable[Tile], cost: Callable[[Tile], float], names: Sequence[str]) -> Tile:
    """The candidate of the least cost, of those that run."""
    best: Tile | None = None
    least = math.inf
    for candidate in candidates:
        text = ", ".join(f"{name} {getattr(candidate, name)}" for name in names)
        try:
            us = cost(candidate)
        except FAILURES as error:
            print(f"{text}: left out, {type(error).__name__}: {str(error)[:100]}", flush=True)
            torch.cuda.synchronize()
            continue
        print(f"{text}: {us:.2f} us", flush=True)
        if us < least * 0.99:
            best, least = candidate, us
    assert best is not None, "no candidate ran"
    return best


def crossover(pool: Executor, decode: Decode, prefill: Prefill) -> int:
    """Up to how many tokens decode's kernels are better, over one row of many tokens and many rows of one token.

    Of all places for it, the one with the least product of times.
    """
    pairs = [(Case(1, tokens, 1, 2), Case(tokens, 1, tokens, 2)) for tokens in CROSSOVER]
    cases = [case for pair in pairs for case in pair]
    compile_ahead(pool, [decode], cases)
    compile_ahead(pool, [prefill], cases)
    times: dict[int, tuple[float, float]] = {}
    for tokens, pair in zip(CROSSOVER, pairs, strict=True):
        logs = [0.0, 0.0]
        for case in pair:
            timer = Timer(case)
            us = [timer(decode), timer(prefill)]
            print(
                f"{case.rows} rows of {case.tokens_per_row}: decode {us[0]:.2f} us, prefill {us[1]:.2f} us", flush=True
            )
            logs = [sum_ + math.log(max(value, 0.5)) for sum_, value in zip(logs, us, strict=True)]
            del timer
            torch.cuda.empty_cache()
        times[tokens] = logs[0], logs[1]
    return min((CROSSOVER[0] // 2, *CROSSOVER), key=lambda place: total(times, place))


def total(times: dict[int, tuple[float, float]], place: int) -> float:
    """The sum of (decode, prefill) over numbers of tokens, decode's up to a place."""
    return sum(both[0] if tokens <= place else both[1] for tokens, both in times.items())


def compile_ahead(pool: Executor, tiles: Sequence[Decode | Prefill], cases: Sequence[Case]) -> None:
    """Compiles what the tiles need on the cases, many at once; Triton keeps it on disk, where the timing finds it."""
    kinds = sorted({(case.rows, case.tokens_per_row) for case in cases})
    jobs: list[Any] = list(product(tiles, kinds, LAYER))
    try:
        list(pool.map(_compile, jobs))
    except BrokenProcessPool:
        print("compiling ahead failed; compiling as it comes", flush=True)


@functools.cache
def _group(shape: Shape) -> Group:
    return Group(shape, [RANK], base=False)


def _compile(job: tuple[Decode | Prefill, tuple[int, int], Shape]) -> None:
    """Runs the kernels once: what Triton compiles depends on numbers of tokens, not on who shares an adapter."""
    tile, (rows, tokens_per_row), shape = job
    try:
        batch = Batch((0,) * rows, tokens_per_row)
        ys = [batch.x(out) for out in shape.outs]
        with_tiles(_group(shape), batch.x(shape.in_features), ys, batch, tile)
        torch.cuda.synchronize()
    except FAILURES:
        pass


if __name__ == "__main__":
    main()
