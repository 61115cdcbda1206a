"""Shrink where x is one-hot: a token's column of A is looked up.

Two numbers, per token of rank r with weights of w bytes: r·w bytes read and 4·r written, no operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, weight_type
from .entries import WORDS
from .plan import COLUMNS

_BLOCK_T = 32
_BLOCK_R = 16


@triton.jit
def lookup_kernel(
    ids, h, table, plan, tokens, tokens_per_row, slot_stride, max_rank, column,
    WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, tile of ranks): each token's row of its own adapter's A → h."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(plan + (token // tokens_per_row) * COLUMNS, mask=token < tokens, other=-1)
    entry = table + slot.to(tl.int64) * slot_stride + column * WORDS
    a = tl.load(entry, mask=slot >= 0, other=0).to(tl.pointer_type(WEIGHT))
    rank = tl.load(entry + 4, mask=slot >= 0, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    index = tl.load(ids + token, mask=slot >= 0, other=0).to(tl.int64)
    values = tl.load(a[:, None] + (index * rank)[:, None] + r[None, :], mask=r[None, :] < rank[:, None], other=0.0)
    place = h + token.to(tl.int64)[:, None] * max_rank + r[None, :]
    tl.store(place, values.to(tl.float32), mask=(slot >= 0)[:, None] & (r < max_rank)[None, :])


def lookup(ids: Tensor, h: Tensor, table: Tensor, plan: Tensor, column: int, weight: torch.dtype) -> None:
    """Launches the lookup: arguments as in `sgmv.lookup`, the columns into h (1, tokens, 1, max_rank)."""
    _, tokens, _, max_rank = h.shape
    launch(
        lookup_kernel, (triton.cdiv(tokens, _BLOCK_T), triton.cdiv(max_rank, _BLOCK_R)),
        ids, h, table, plan, tokens, tokens // plan.shape[0], table.stride(0), max_rank, column,
        WEIGHT=weight_type(weight), BLOCK_T=_BLOCK_T, BLOCK_R=_BLOCK_R, WORDS=WORDS, COLUMNS=COLUMNS,
        device=ids.device, num_warps=2,
    )  # fmt: skip
