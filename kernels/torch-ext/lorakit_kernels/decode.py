"""SGMV for few tokens: decode steps. Multiply and add in fp32, token by token.

In a decode step with many tenants most segments are one token long, and a matrix unit's tile would be mostly padding.
Here every token has programs of its own, and its products are ordinary fused multiply-adds: nothing to sort, nothing to
pad, and a token's bits cannot depend on what shares the batch. Tokens that do share an adapter find its weights in the
second-level cache. Tiles for the matrix units were tried too, and gained nothing (docs/kernels.md).

Two numbers, per token with an adapter of its own, at a module of rank r with weights of w bytes (in brackets:
Llama-2-7B's q_proj, rank 16, bf16):

    bytes       r·(in + out)·w for A and B; 2·in + 4·out for x and y             [262,144 + 24,576]
    operations  2·r·(in + out)                                                   [262,144]

About one operation a byte: memory is the limit, if enough of it is under way at once. So shrink splits `in` over
programs. Its partial sums lie side by side, and expand adds them up in a fixed order: no atomics, nothing to clear, the
same bits every time.

Where the device can (compute capability 9.0), each kernel is launched before the one ahead of it in the stream has
ended (programmatic dependent launch), and reads its weights, which no kernel writes, before it waits: those bytes are
on their way while the base's product, or shrink, still runs. Every program waits, also one with nothing to do, so that
a kernel that has ended vouches for all that came before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import FIRSTS, VARYING, launch, padded, weight_type
from .entries import WORDS
from .plan import COLUMNS
from .siblings import channels, column_of, expanding, select
from .tuning import Decode


@triton.jit(do_not_specialize=VARYING)
def shrink_kernel(
    x, h, table, plan, tokens, tokens_per_row, in_features, slot_stride, max_rank,
    column0, column1, column2, column3,
    WEIGHT: tl.constexpr, SIBLINGS: tl.constexpr, SPLITS: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, token, sibling): BLOCK_K columns of A times the token's x → partial sums."""
    split = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(1) // tokens_per_row
    sibling = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(plan + row * COLUMNS)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    column = column_of(sibling, column0, column1, column2, column3, SIBLINGS)
    entry = table + slot.to(tl.int64) * slot_stride + column * WORDS
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16)
    rank = tl.load(entry + 4).to(tl.int32)
    part = h + ((sibling * tokens + token) * SPLITS + split) * max_rank
    r = tl.arange(0, BLOCK_R)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    weights = tile_of_a(a, 0, r, rank, k, in_features)
    if PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(x + token * in_features + k, mask=k < in_features, other=0.0).to(tl.float32)
    for first in range(0, rank, BLOCK_R):
        if not SINGLE:
            # The next tile is on its way while this one is summed.
            ahead = tile_of_a(a, first + BLOCK_R, r, rank, k, in_features)
        sums = tl.sum(weights.to(tl.float32) * values[None, :], axis=1)
        # Sums past the rank are written as zeros, so that expand reads whole tiles.
        tl.store(part + first + r, tl.where(first + r < rank, sums, 0.0))
        if not SINGLE:
            weights = ahead


@triton.jit
def tile_of_a(a, first, r, rank, k, in_features):
    """A's rows from `first` on, zeros past the rank."""
    ranks = first + r
    mask = (ranks < rank)[:, None] & (k < in_features)[None, :]
    return tl.load(a + ranks[:, None] * in_features + k[None, :], mask=mask, other=0.0)


@triton.jit
def tile_of_b(b, first, r, rank, n, out):
    """B's rows from `first` on, zeros past the rank."""
    ranks = first + r
    return tl.load(b + ranks[:, None] * out + n[None, :], mask=(ranks < rank)[:, None] & (n < out)[None, :], other=0.0)


@triton.jit(do_not_specialize=[*VARYING, *FIRSTS])
def expand_kernel(
    y0, y1, y2, y3, h, table, plan, tokens, tokens_per_row, slot_stride, max_rank,
    column0, column1, column2, column3, out0, out1, out2, out3, first1, first2, first3,
    WEIGHT: tl.constexpr, SIBLINGS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POWER: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, token): y ← c ⊙ (y + s · h B) + d, for BLOCK_N channels of the token."""
    token = tl.program_id(1).to(tl.int64)
    slot = tl.load(plan + tl.program_id(1) // tokens_per_row * COLUMNS)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    sibling, block, y, column, out = select(
        tl.program_id(0), y0, y1, y2, y3, column0, column1, column2, column3, out0, out1, out2, out3,
        first1, first2, first3, SIBLINGS,
    )  # fmt: skip
    b, c, d, rank, scale = expanding(table + slot.to(tl.int64) * slot_stride + column * WORDS, WEIGHT)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    parts = h + (sibling * tokens + token) * SPLITS * max_rank
    # Without factors nothing was summed: what lies in h is not ours.
    s = tl.arange(0, SPLITS_POWER)
    summed = (s < tl.where(rank > 0, SPLITS, 0))[:, None]
    weights = tile_of_b(b, 0, r, rank, n, out)
    if PDL:
        tl.extra.cuda.gdc_wait()
    base = tl.load(y + token * out + n, mask=n < out, other=0.0).to(tl.float32)
    sums = tl.sum(tl.load(parts + s[:, None] * max_rank + r[None, :], mask=summed, other=0.0), axis=0)
    share = tl.sum(weights.to(tl.float32) * sums[:, None], axis=0)
    if not SINGLE:
        weights = tile_of_b(b, BLOCK_R, r, rank, n, out)
        for first in range(BLOCK_R, rank, BLOCK_R):
            # The next tile is on its way while this one is multiplied.
            ahead = tile_of_b(b, first + BLOCK_R, r, rank, n, out)
            place = parts + s[:, None] * max_rank + (first + r)[None, :]
            sums = tl.sum(tl.load(place, mask=summed, other=0.0), axis=0)
            share += tl.sum(weights.to(tl.float32) * sums[:, None], axis=0)
            weights = ahead
    # A module that the adapter leaves alone keeps its bits: -0.0 + 0.0 would not be -0.0.
    if (rank > 0) | (c != 0) | (d != 0):
        value = channels(base + scale * share, c, d, n, out)
        tl.store(y + token * out + n, value.to(y.dtype.element_ty), mask=n < out)


def splits(in_features: int, tile: Decode) -> int:
    """How many partial sums shrink leaves: the module alone sets it, so a token's bits are the same in any batch."""
    return triton.cdiv(in_features, tile.block_k)


def shrink(
    x: Tensor, h: Tensor, table: Tensor, plan: Tensor, columns: Sequence[int], weight: torch.dtype, tile: Decode
) -> None:
    """Launches shrink: arguments as in `sgmv.shrink`, the sums into h (siblings, tokens, splits, max_rank)."""
    siblings, tokens, parts, max_rank = h.shape
    assert max_rank % tile.block_r == 0
    launch(
        shrink_kernel, (parts, tokens, siblings),
        x, h, table, plan, tokens, tokens // plan.shape[0], x.shape[-1], table.stride(0), max_rank, *padded(columns),
        WEIGHT=weight_type(weight), SIBLINGS=siblings, SPLITS=parts, SINGLE=max_rank <= tile.block_r,
        BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, WORDS=WORDS, COLUMNS=COLUMNS,
        device=x.device, num_warps=tile.shrink_warps,
    )  # fmt: skip


def expand(
    ys: Sequence[Tensor], h: Tensor, table: Tensor, plan: Tensor, columns: Sequence[int], weight: torch.dtype,
    tile: Decode,
) -> None:  # fmt: skip
    """Launches expand: arguments as in `sgmv.expand_`."""
    siblings, tokens, parts, max_rank = h.shape
    outs = [y.shape[-1] for y in ys]
    firsts = [sum(triton.cdiv(out, tile.block_n) for out in outs[:i]) for i in range(siblings + 1)]
    launch(
        expand_kernel, (firsts[-1], tokens),
        *padded(ys), h, table, plan, tokens, tokens // plan.shape[0], table.stride(0), max_rank,
        *padded(columns), *padded(outs), *padded(firsts[:-1])[1:],
        WEIGHT=weight_type(weight), SIBLINGS=siblings, SPLITS=parts, SPLITS_POWER=triton.next_power_of_2(parts),
        SINGLE=max_rank <= tile.block_r,
        BLOCK_N=tile.block_n, BLOCK_R=tile.block_r, WORDS=WORDS, COLUMNS=COLUMNS,
        device=h.device, num_warps=tile.expand_warps,
    )  # fmt: skip
