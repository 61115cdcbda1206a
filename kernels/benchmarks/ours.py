"""The operators, called as the runtime calls them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shapes import DTYPE, Batch, Group
from torch import Tensor

from lorakit_kernels import decode, prefill
from lorakit_kernels.sgmv import expand_, shrink
from lorakit_kernels.tuning import Decode, Prefill


def sums(group: Group, x: Tensor, batch: Batch) -> Tensor:
    """The first launch, A x."""
    return shrink(x, group.table, batch.plan, group.columns, group.max_rank, DTYPE)


def add(group: Group, ys: Sequence[Tensor], h: Tensor, batch: Batch) -> None:
    """The second launch, y ← y + s · B (A x)."""
    expand_(ys, h, group.table, batch.plan, group.columns, DTYPE)


def chained(group: Group, x: Tensor, ys: Sequence[Tensor], batch: Batch) -> None:
    """Both launches, in the current stream."""
    add(group, ys, sums(group, x, batch), batch)


def with_tiles(group: Group, x: Tensor, ys: Sequence[Tensor], batch: Batch, tile: Decode | Prefill) -> None:
    """Both launches of the kernels that a tile is for, whatever is set for this GPU."""
    kernels = decode if isinstance(tile, Decode) else prefill
    shape = (len(ys), batch.tokens, kernels.splits(x.shape[-1], tile), group.max_rank)
    h = x.new_empty(shape, dtype=torch.float32)
    kernels.shrink(x, h, group.table, batch.plan, group.columns, DTYPE, tile)
    kernels.expand(ys, h, group.table, batch.plan, group.columns, DTYPE, tile)
