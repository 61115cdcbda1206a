"""SGMV for few tokens: decode steps. Multiply and add in fp32, token by token.

In a decode step with many tenants most segments are one token long, and a matrix unit's tile would be mostly padding.
Here every token has programs of its own, and its products are ordinary fused multiply-adds: nothing to sort, nothing to
pad, and a token's bits cannot depend on what shares the batch. Tokens that do share an adapter find its weights in the
second-level cache. Tiles for the matrix units were tried too, and gained nothing (docs/kernels.md).

Two numbers, per token with an adapter of its own, at a module of rank r with weights of w bytes (in brackets:
Llama-2-7B's q_proj, rank 16, bf16):

    bytes       r·(in + out)·w for A and B; 2·in + 4·out for x and y             [262,144 + 24,576]
    operations  2·r·(in + out)                                                   [262,144]

About one operation a byte: memory is the limit, if enough of it is under way at once and little is done once it has
come. So shrink splits `in` and the ranks over programs, and a program reads all that it works on before it computes.
Its partial sums lie side by side, and expand adds them up in a fixed order: no atomics, nothing to clear, the same bits
every time. Elements are counted in 32 bits from 64-bit addresses, and tiles are spread over threads so that operands
meet without passing through shared memory.

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
from .siblings import channels, column_of, expanding, select, tile_of_b
from .tuning import Decode


@triton.jit(do_not_specialize=VARYING)
def shrink_kernel(
    x, h, table, plan, tokens, tokens_per_row, in_features, slot_stride, max_rank,
    column0, column1, column2, column3,
    WEIGHT: tl.constexpr, SIBLINGS: tl.constexpr, SPLITS: tl.constexpr, SINGLE: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, TWINS: tl.constexpr,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, token, sibling and tile of ranks): BLOCK_K columns of A times the token's x → partial sums."""
    split = tl.program_id(0)
    token = tl.program_id(1)
    sibling = tl.program_id(2) % SIBLINGS
    first = tl.program_id(2) // SIBLINGS * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot = slot_of(token, plan, tokens_per_row, ALONE, COLUMNS)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    column = column_of(sibling, column0, column1, column2, column3, SIBLINGS)
    entry = table + slot.to(tl.int64) * slot_stride + column * WORDS
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16)
    rank = tl.load(entry + 4).to(tl.int32)
    if not SINGLE:
        if first >= rank:
            if PDL:
                tl.extra.cuda.gdc_wait()
            return
    part = h + ((sibling * tokens + token) * SPLITS + split) * max_rank
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    weights = tile_of_a(a, r, rank, k, in_features)
    # Read once for each of the TWINS, x is spread over threads as A is, and need not pass through shared memory.
    twin = tl.arange(0, TWINS)[:, None]
    place = x + (token * in_features + twin * 0 + k[None, :])
    if PDL:
        tl.extra.cuda.gdc_wait()
    values = tl.load(place, mask=(twin >= 0) & (k < in_features)[None, :], other=0.0).to(tl.float32)
    # Sums past the rank are written as zeros, so that expand reads whole tiles.
    tl.store(part + r, tl.where(r < rank, sums_of(weights, values), 0.0))


@triton.jit
def sums_of(weights, values):
    """weights (ranks, columns) times values (twins, columns), each the same → (ranks,)."""
    RANKS: tl.constexpr = weights.shape[0]
    TWINS: tl.constexpr = values.shape[0]
    split = tl.reshape(weights, (RANKS // TWINS, TWINS, weights.shape[1])).to(tl.float32)
    return tl.reshape(tl.sum(split * values[None, :, :], axis=2), (RANKS,))


@triton.jit
def slot_of(token, plan, tokens_per_row, ALONE: tl.constexpr, COLUMNS: tl.constexpr):
    """The slot of a token's row; a row of a single token needs no division to be found."""
    row = token
    if not ALONE:
        row = token // tokens_per_row
    return tl.load(plan + row * COLUMNS)


@triton.jit
def tile_of_a(a, r, rank, k, in_features):
    """A's rows r, (ranks, columns), zeros past the rank."""
    mask = (r < rank)[:, None] & (k < in_features)[None, :]
    return tl.load(a + ((r * in_features)[:, None] + k[None, :]), mask=mask, other=0.0)


@triton.jit(do_not_specialize=[*VARYING, *FIRSTS])
def expand_kernel(
    y0, y1, y2, y3, h, table, plan, tokens, tokens_per_row, slot_stride, max_rank,
    column0, column1, column2, column3, out0, out1, out2, out3, first1, first2, first3,
    WEIGHT: tl.constexpr, SIBLINGS: tl.constexpr, SPLITS: tl.constexpr, SPLITS_POWER: tl.constexpr,
    SINGLE: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CHANNELS: tl.constexpr,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, token): y ← c ⊙ (y + s · h B) + d, for BLOCK_N channels of the token."""
    token = tl.program_id(1)
    slot = slot_of(token, plan, tokens_per_row, ALONE, COLUMNS)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    sibling, block, y, column, out = select(
        tl.program_id(0), y0, y1, y2, y3, column0, column1, column2, column3, out0, out1, out2, out3,
        first1, first2, first3, SIBLINGS,
    )  # fmt: skip
    b, c, d, rank, scale = expanding(table + slot.to(tl.int64) * slot_stride + column * WORDS, WEIGHT)
    # So many neighbours to a thread that a thread has every rank of its channels: nothing is summed across threads.
    n = block * BLOCK_N + tl.max_contiguous(tl.arange(0, BLOCK_N), CHANNELS)
    r = tl.arange(0, BLOCK_R)
    s = tl.arange(0, SPLITS_POWER)[:, None]
    parts = h + ((sibling * tokens + token) * SPLITS + s) * max_rank
    # Without factors nothing was summed: what lies in h is not ours.
    summed = s < tl.where(rank > 0, SPLITS, 0)
    weights = tile_of_b(b, r, rank, n, out)
    if PDL:
        tl.extra.cuda.gdc_wait()
    place = y + (token * out + n)
    base = tl.load(place, mask=n < out, other=0.0).to(tl.float32)
    sums = tl.sum(tl.load(parts + r[None, :], mask=summed, other=0.0), axis=0)
    share = tl.sum(weights.to(tl.float32) * (scale * sums)[:, None], axis=0)
    if not SINGLE:
        weights = tile_of_b(b, BLOCK_R + r, rank, n, out)
        for first in range(BLOCK_R, rank, BLOCK_R):
            # The next tile is on its way while this one is multiplied.
            ahead = tile_of_b(b, first + BLOCK_R + r, rank, n, out)
            sums = tl.sum(tl.load(parts + (first + r)[None, :], mask=summed, other=0.0), axis=0)
            share += tl.sum(weights.to(tl.float32) * (scale * sums)[:, None], axis=0)
            weights = ahead
    # A module that the adapter leaves alone keeps its bits: -0.0 + 0.0 would not be -0.0.
    if (rank > 0) | (c != 0) | (d != 0):
        value = channels(base + share, c, d, n, out)
        tl.store(place, value.to(y.dtype.element_ty), mask=n < out)


def splits(in_features: int, tile: Decode) -> int:
    """How many partial sums shrink leaves: the module alone sets it, so a token's bits are the same in any batch."""
    return triton.cdiv(in_features, tile.block_k)


def shrink(
    x: Tensor, h: Tensor, table: Tensor, plan: Tensor, columns: Sequence[int], weight: torch.dtype, tile: Decode,
    _segments: int = 0,
) -> None:  # fmt: skip
    """Launches shrink: arguments as in `sgmv.shrink`, the sums into h (siblings, tokens, splits, max_rank)."""
    siblings, tokens, parts, max_rank = h.shape
    assert max_rank % tile.block_r == 0
    assert max(x.numel(), h.numel(), x.shape[-1] * max_rank) < 2**31, "kernels count elements in 32 bits"
    threads, vector = 32 * tile.shrink_warps, 16 // weight.itemsize
    launch(
        shrink_kernel, (parts, tokens, siblings * (max_rank // tile.block_r)),
        x, h, table, plan, tokens, tokens // plan.shape[0], x.shape[-1], table.stride(0), max_rank, *padded(columns),
        WEIGHT=weight_type(weight), SIBLINGS=siblings, SPLITS=parts, SINGLE=max_rank <= tile.block_r,
        ALONE=tokens == plan.shape[0],
        BLOCK_K=tile.block_k, BLOCK_R=tile.block_r, TWINS=min(max(1, threads * vector // tile.block_k), tile.block_r),
        WORDS=WORDS, COLUMNS=COLUMNS,
        device=x.device, num_warps=tile.shrink_warps,
    )  # fmt: skip


def expand(
    ys: Sequence[Tensor], h: Tensor, table: Tensor, plan: Tensor, columns: Sequence[int], weight: torch.dtype,
    tile: Decode, _segments: int = 0,
) -> None:  # fmt: skip
    """Launches expand: arguments as in `sgmv.expand_`."""
    siblings, tokens, parts, max_rank = h.shape
    outs = [y.shape[-1] for y in ys]
    assert max(h.numel(), max(outs) * max(tokens, max_rank)) < 2**31, "kernels count elements in 32 bits"
    firsts = [sum(triton.cdiv(out, tile.block_n) for out in outs[:i]) for i in range(siblings + 1)]
    launch(
        expand_kernel, (firsts[-1], tokens),
        *padded(ys), h, table, plan, tokens, tokens // plan.shape[0], table.stride(0), max_rank,
        *padded(columns), *padded(outs), *padded(firsts[:-1])[1:],
        WEIGHT=weight_type(weight), SIBLINGS=siblings, SPLITS=parts, SPLITS_POWER=triton.next_power_of_2(parts),
        SINGLE=max_rank <= tile.block_r, ALONE=tokens == plan.shape[0],
        BLOCK_N=tile.block_n, BLOCK_R=tile.block_r,
        CHANNELS=max(1, min(16 // weight.itemsize, tile.block_n // (32 * tile.expand_warps))),
        WORDS=WORDS, COLUMNS=COLUMNS,
        device=h.device, num_warps=tile.expand_warps,
    )  # fmt: skip
