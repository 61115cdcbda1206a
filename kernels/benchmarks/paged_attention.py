"""Attention of a decode step over a paged cache: lorakit's kernel, and FlashAttention as transformers calls it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import plots
import torch
from rivals import FAILURES
from shapes import DTYPE
from timing import COLD_BYTES, REPEATS, WARM, alone, median
from torch import Tensor
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lorakit.bench.harness import save, show, statistics_of
from lorakit.engine.attention import by_flash_attention
from lorakit_kernels import paged
from lorakit_kernels.tuning import Paged

PAGE, SIZE = 256, 128
BANDWIDTH = 3.0e6  # Bytes a microsecond.
LAYERS, FEW_REPEATS = 32, 11
ENGINES_TABLE = 32  # Blocks for which an engine's table has room, if its base has 8,192 positions.

Attend = Callable[[int], Tensor]


class Case(NamedTuple):
    """Rows of a batch.

    Attributes:
        name: what it is called.
        lengths: tokens that each row has.
        queries: heads.
        heads: of keys and values.
    """

    name: str
    lengths: Sequence[int]
    queries: int
    heads: int

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return 4 * sum(self.lengths) * self.heads * SIZE


_MIXED = tuple(random.Random(3).choices(range(20, 2000), k=32))
FEW = (
    Case("1 row of 208", (208,), 32, 32),
    Case("1 row of 208, 4 queries a key", (208,), 32, 8),
    Case("1 row of 8,000, 4 queries a key", (8000,), 32, 8),
    Case("32 rows of 208, 4 queries a key", (208,) * 32, 32, 8),
    Case("32 rows of 20 to 2,000, 4 queries a key", _MIXED, 32, 8),
)
MANY = (
    Case("32 rows of 208", (208,) * 32, 32, 32),
    Case("32 rows of 20 to 2,000", _MIXED, 32, 32),
    Case("64 rows of 600", (600,) * 64, 32, 32),
    Case("128 rows of 400, 4 queries a key", (400,) * 128, 32, 8),
)
LONG = (
    Case("1 row of 32,000, 4 queries a key", (32000,), 32, 8),
    Case("8 rows of 32,000, 4 queries a key", (32000,) * 8, 32, 8),
)
"""For which tiles are not chosen."""


class Batch:
    """A case's tensors, with caches of several layers: together more than the second-level cache holds."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rows, pages = len(case.lengths), [length // PAGE + 1 for length in case.lengths]
        places = iter(torch.randperm(sum(pages)).tolist())
        table = torch.full((rows, max(ENGINES_TABLE, *pages)), -1, dtype=torch.int32)
        for row, count in enumerate(pages):
            table[row, :count] = torch.tensor([next(places) for _ in range(count)])
        self.table = table.cuda()
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        self.tickets = torch.zeros(rows * case.heads, dtype=torch.int32, device="cuda")
        self.query = torch.randn(rows, case.queries, SIZE, device="cuda", dtype=DTYPE)
        self.key, self.value = torch.randn(2, rows, case.heads, SIZE, device="cuda", dtype=DTYPE).unbind()
        # As the engine's cache has them: a token's keys and values lie one behind the other.
        layers = min(LAYERS, max(2, -(-COLD_BYTES // case.nbytes)))
        shape = sum(pages), PAGE, 2, case.heads, SIZE
        self.caches = [torch.randn(shape, device="cuda", dtype=DTYPE).unbind(2) for _ in range(layers)]

    def ours(self, layer: int) -> Tensor:
        """By the tiles of this GPU."""
        return paged.attend(*self._given(layer), self.tickets, SIZE**-0.5)

    def by(self, tile: Paged, layer: int) -> Tensor:
        """By a tile."""
        return paged.attend_by(tile, *self._given(layer), self.tickets, SIZE**-0.5)

    def by_flash_attention(self, layer: int) -> Tensor:
        """As transformers has it."""
        return by_flash_attention(*self._given(layer), SIZE**-0.5, self._flash_attention)

    @cached_property
    def _flash_attention(self) -> str:
        return "flash_attention_3" if is_flash_attn_3_available() else "flash_attention_2"

    def _given(self, layer: int) -> tuple[Tensor, ...]:
        caches = self.caches[layer % len(self.caches)]
        return self.query, self.key, self.value, *caches, self.lengths, self.table

    def times(self, attend: Attend, repeats: int = REPEATS) -> list[float]:
        """Microseconds of a launch."""

        def work() -> None:
            for layer in range(LAYERS):
                attend(layer)

        return alone(work, LAYERS, repeats)


def run(folder: Path) -> None:
    if paged.tiles(torch.device("cuda")).paged is None:
        print("paged_attention: this GPU has no tiles for it")
        return
    results = dict(_measured())
    setting = {
        "dtype": "bfloat16",
        "head_size": SIZE,
        "page": PAGE,
        "heads_of_queries": 32,
        "floor": "bytes of keys and values at 3.0 TB/s",
        "launches": LAYERS,
        "repeats": REPEATS,
        "warm": WARM,
    }
    path = save("kernels_paged_attention", folder, setting, results)
    columns = ["rows", "min us", "median us", "max us", "FlashAttention, median us", "bytes at 3.0 TB/s, us"]
    rows = [
        [
            name,
            *plots.three(found["us"]["lorakit"]),
            f"{found['us']['FlashAttention']['median']:.2f}" if "FlashAttention" in found["us"] else "",
            f"{found['floor_us']:.2f}",
        ]
        for name, found in results.items()
    ]
    show("Attention over a paged cache", columns, rows, path)


def _measured() -> Iterator[tuple[str, dict[str, Any]]]:
    with_flash = is_flash_attn_2_available() or is_flash_attn_3_available()
    for case in (*FEW, *MANY, *LONG):
        batch = Batch(case)
        us = {"lorakit": statistics_of(batch.times(batch.ours))}
        if with_flash:
            us["FlashAttention"] = statistics_of(batch.times(batch.by_flash_attention))
        yield case.name, {"us": us, "floor_us": case.nbytes / BANDWIDTH}
        del batch
        torch.cuda.empty_cache()


def cost(tile: Paged, batches: Sequence[Batch]) -> float:
    """Microseconds of a launch, by the bytes that it reads at full bandwidth; the mean of some cases."""
    costs = [
        median(batch.times(partial(batch.by, tile), FEW_REPEATS)) / max(1.0, batch.case.nbytes / BANDWIDTH)
        for batch in batches
    ]
    return sum(costs) / len(costs)


def compile_tile(tile: Paged) -> None:
    """Compiles what a tile needs; what cannot be is left out where it is timed."""
    for case in (*FEW, *MANY):
        with contextlib.suppress(*FAILURES):
            Batch(case._replace(lengths=(1,) * len(case.lengths))).by(tile, 0)
            torch.cuda.synchronize()
