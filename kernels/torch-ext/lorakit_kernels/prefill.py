"""SGMV for many tokens: prompts. Matrix units, a tile of tokens of one segment at a time.

Two numbers, for T tokens at s sibling modules of rank r, x of two bytes (in brackets: 8,192 tokens at Llama-2-7B's
q, k and v, rank 16):

    bytes       2·T·in for x, read once for all siblings; 4·T·out for each y, read and written     [67 MB + 403 MB]
    operations  2·T·r·(in + out) for each sibling                                                    [6.4 GFLOP]

14 operations a byte, far under what the matrix units do meanwhile: memory is the limit, so x is read once for all
siblings, and y is read and written once in whole lines.

bf16 weights are multiplied as they are. Expand's left side, shrink's sum in fp32, is then split into two bf16 numbers,
whose products add up to those of fp32 to 16 bits; a plain rounding would put the adapter's share further from the exact
one than PEFT's. Every other mix of dtypes is multiplied as fp32 in three tf32 products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import FIRSTS, VARYING, launch, padded, takes_as_is, weight_type
from .entries import WORDS
from .plan import COLUMNS
from .siblings import channels, column_of, expanding, select, tile_of_b
from .tuning import Prefill


@triton.jit
def tile_of(
    tile, plan, segments, tokens_per_row,
    BLOCK_M: tl.constexpr, POWER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile-th tile of all segments: (its slot, -1 past the last; its tokens; which of them are there)."""
    segment = tl.arange(0, POWER)
    start = tl.load(plan + segment * COLUMNS + 3, mask=segment < segments, other=0)
    end = tl.load(plan + segment * COLUMNS + 4, mask=segment < segments, other=0)
    ends = tl.cumsum(tl.cdiv((end - start) * tokens_per_row, BLOCK_M), 0)
    index = tl.sum((ends <= tile).to(tl.int32), 0)
    slot = tl.load(plan + index * COLUMNS + 2, mask=index < segments, other=-1)
    start = tl.load(plan + index * COLUMNS + 3, mask=index < segments, other=0)
    end = tl.load(plan + index * COLUMNS + 4, mask=index < segments, other=0)
    before = tl.max(tl.where(segment < index, ends, 0), 0)
    place = (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = place < (end - start) * tokens_per_row
    row = tl.load(plan + (start + place // tokens_per_row) * COLUMNS + 1, mask=inside, other=0)
    return slot, row.to(tl.int64) * tokens_per_row + place % tokens_per_row, inside


@triton.jit
def product(a, b, acc, EXACT: tl.constexpr):
    """acc + a b: bf16 or fp16 as they are, else fp32 in three tf32 products."""
    if EXACT:
        return tl.dot(a, b, acc)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit(do_not_specialize=["segments", *VARYING])
def shrink_kernel(
    x, h, table, plan, segments, tokens, tokens_per_row, in_features, slot_stride, max_rank,
    column0, column1, column2, column3,
    WEIGHT: tl.constexpr, SIBLINGS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, POWER: tl.constexpr,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, tile, tile of ranks): SPLIT_K columns of x times those of every sibling's A → partial sums."""
    split = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    slot, token, inside = tile_of(tl.program_id(1), plan, segments, tokens_per_row, BLOCK_M, POWER, COLUMNS)
    if slot >= 0:
        r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
        k = tl.arange(0, BLOCK_K)
        line = table + slot.to(tl.int64) * slot_stride
        addresses = ()
        ranks = ()
        sums = ()
        most = 0
        for i in tl.static_range(SIBLINGS):
            entry = line + column_of(i, column0, column1, column2, column3, SIBLINGS) * WORDS
            addresses = addresses + (tl.multiple_of(tl.load(entry).to(tl.pointer_type(WEIGHT)), 16),)
            rank = tl.load(entry + 4).to(tl.int32)
            ranks = ranks + (rank,)
            sums = sums + (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
            most = tl.maximum(most, rank)
        if PDL:
            tl.extra.cuda.gdc_wait()
        if tl.program_id(2) * BLOCK_R < most:
            for first in range(split * SPLIT_K, tl.minimum((split + 1) * SPLIT_K, in_features), BLOCK_K):
                columns = first + k
                values = tl.load(
                    x + token[:, None] * in_features + columns[None, :],
                    mask=inside[:, None] & (columns < in_features)[None, :], other=0.0,
                )  # fmt: skip
                new = ()
                for i in tl.static_range(SIBLINGS):
                    weights = tl.load(
                        addresses[i] + r[None, :] * in_features + columns[:, None],
                        mask=(r < ranks[i])[None, :] & (columns < in_features)[:, None], other=0.0,
                    )  # fmt: skip
                    new = new + (product(values, weights, sums[i], EXACT),)
                sums = new
            for i in tl.static_range(SIBLINGS):
                part = h + ((i * tokens + token) * SPLITS + split) * max_rank
                value = tl.where((r < ranks[i])[None, :], sums[i], 0.0)
                tl.store(part[:, None] + r[None, :], value, mask=inside[:, None] & (r < max_rank)[None, :])
    elif PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def sums_of(parts, r, rank, inside, max_rank, SPLITS: tl.constexpr):
    """Shrink's sums, (tokens, ranks), zeros past the rank: what lies there is not ours."""
    present = inside[:, None] & (r < rank)[None, :]
    sums = tl.load(parts[:, None] + r[None, :], mask=present, other=0.0)
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(parts[:, None] + split * max_rank + r[None, :], mask=present, other=0.0)
    return sums


@triton.jit
def share_of(sums, weights, share, WEIGHT: tl.constexpr, HALVES: tl.constexpr):
    """share + sums B."""
    if HALVES:
        high = sums.to(WEIGHT)
        low = (sums - high.to(tl.float32)).to(WEIGHT)
        return tl.dot(low, weights, tl.dot(high, weights, share))
    return product(sums, weights, share, False)


@triton.jit(do_not_specialize=["segments", *VARYING, *FIRSTS])
def expand_kernel(
    y0, y1, y2, y3, h, table, plan, segments, tokens, tokens_per_row, slot_stride, max_rank,
    column0, column1, column2, column3, out0, out1, out2, out3, first1, first2, first3,
    WEIGHT: tl.constexpr, SIBLINGS: tl.constexpr, SPLITS: tl.constexpr, SINGLE: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, POWER: tl.constexpr,
    WORDS: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (STEPS blocks of channels, tile of tokens): y ← c ⊙ (y + s · h B) + d."""
    slot, token, inside = tile_of(tl.program_id(1), plan, segments, tokens_per_row, BLOCK_M, POWER, COLUMNS)
    if slot < 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        return
    sibling, group, y, column, out = select(
        tl.program_id(0), y0, y1, y2, y3, column0, column1, column2, column3, out0, out1, out2, out3,
        first1, first2, first3, SIBLINGS,
    )  # fmt: skip
    b, c, d, rank, scale = expanding(table + slot.to(tl.int64) * slot_stride + column * WORDS, WEIGHT)
    r = tl.arange(0, BLOCK_R)
    parts = h + (sibling * tokens + token) * SPLITS * max_rank
    if PDL:
        tl.extra.cuda.gdc_wait()
    # A module that the adapter leaves alone keeps its bits.
    if (rank == 0) & (c == 0) & (d == 0):
        return
    sums = sums_of(parts, r, rank, inside, max_rank, SPLITS)
    # The next blocks of B and y are on their way while one is multiplied.
    for block in tl.range(group * STEPS, tl.minimum((group + 1) * STEPS, tl.cdiv(out, BLOCK_N)), num_stages=STAGES):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        place = y + token[:, None] * out + n[None, :]
        there = inside[:, None] & (n < out)[None, :]
        base = tl.load(place, mask=there, other=0.0)
        weights = tile_of_b(b, r, rank, n, out)
        share = share_of(sums, weights, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WEIGHT, HALVES)
        if not SINGLE:
            for first in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
                more = sums_of(parts, first + r, rank, inside, max_rank, SPLITS)
                share = share_of(more, tile_of_b(b, first + r, rank, n, out), share, WEIGHT, HALVES)
        value = channels(base.to(tl.float32) + scale * share, c, d, n[None, :], out)
        tl.store(place, value.to(y.dtype.element_ty), mask=there)


def splits(in_features: int, tile: Prefill) -> int:
    """How many partial sums shrink leaves."""
    return triton.cdiv(in_features, tile.split_k)


LOOPED = 32
"""Ranks that a tile of expand holds at most, when it is one of several."""


def block_r(max_rank: int, siblings: int, weight: torch.dtype) -> int:
    """Ranks that a tile of shrink holds: what registers allow, since each tile of ranks reads x anew."""
    most = 16 if weight.itemsize > 2 else 64 if siblings <= 2 else 32
    return min(most, triton.next_power_of_2(max_rank))


def shrink(
    x: Tensor,
    h: Tensor,
    table: Tensor,
    plan: Tensor,
    columns: Sequence[int],
    weight: torch.dtype,
    tile: Prefill,
    segments: int = 0,
) -> None:
    """Launches shrink: arguments as in `sgmv.shrink`, the sums into h (siblings, tokens, splits, max_rank)."""
    siblings, tokens, parts, max_rank = h.shape
    segments = segments or plan.shape[0]
    block = block_r(max_rank, siblings, weight)
    launch(
        shrink_kernel, (parts, tokens // tile.block_m + segments, triton.cdiv(max_rank, block)),
        x, h, table, plan, segments, tokens, tokens // plan.shape[0], x.shape[-1], table.stride(0), max_rank,
        *padded(columns),
        WEIGHT=weight_type(weight), SIBLINGS=siblings, SPLITS=parts, SPLIT_K=tile.split_k,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=block, POWER=triton.next_power_of_2(segments),
        WORDS=WORDS, COLUMNS=COLUMNS, EXACT=x.dtype == weight and takes_as_is(weight),
        device=x.device, num_warps=tile.shrink_warps, num_stages=tile.shrink_stages,
    )  # fmt: skip


def expand(
    ys: Sequence[Tensor],
    h: Tensor,
    table: Tensor,
    plan: Tensor,
    columns: Sequence[int],
    weight: torch.dtype,
    tile: Prefill,
    segments: int = 0,
) -> None:
    """Launches expand: arguments as in `sgmv.expand_`."""
    siblings, tokens, parts, max_rank = h.shape
    segments = segments or plan.shape[0]
    outs = [y.shape[-1] for y in ys]
    width = tile.block_n * tile.expand_steps
    firsts = [sum(triton.cdiv(out, width) for out in outs[:i]) for i in range(siblings + 1)]
    single = max_rank <= tile.expand_ranks
    # One tile of all ranks stays in registers from block to block; more than one have to share them.
    block = triton.next_power_of_2(max_rank) if single else min(tile.expand_ranks, LOOPED)
    launch(
        expand_kernel, (firsts[-1], tokens // tile.block_m + segments),
        *padded(ys), h, table, plan, segments, tokens, tokens // plan.shape[0], table.stride(0), max_rank,
        *padded(columns), *padded(outs), *padded(firsts[:-1])[1:],
        WEIGHT=weight_type(weight), SIBLINGS=siblings, SPLITS=parts, SINGLE=single,
        STEPS=tile.expand_steps, STAGES=tile.expand_stages,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block,
        POWER=triton.next_power_of_2(segments),
        WORDS=WORDS, COLUMNS=COLUMNS, HALVES=weight == torch.bfloat16 and takes_as_is(weight),
        device=h.device, num_warps=tile.expand_warps,
    )  # fmt: skip
