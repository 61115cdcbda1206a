"""What kernels share that serve several sibling modules in one launch, up to four: q, k and v; gate and up."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_of(sibling, column0, column1, column2, column3, SIBLINGS: tl.constexpr):
    """The table's column of a sibling."""
    column = column0
    if SIBLINGS > 1:
        if sibling == 1:
            column = column1
    if SIBLINGS > 2:
        if sibling == 2:
            column = column2
    if SIBLINGS > 3:
        if sibling == 3:
            column = column3
    return column


@triton.jit
def select(
    tile, y0, y1, y2, y3, column0, column1, column2, column3, out0, out1, out2, out3, first1, first2, first3,
    SIBLINGS: tl.constexpr,
):  # fmt: skip
    """Whose channels a tile holds: (sibling, its block of channels, its y, column and number of channels)."""
    sibling = 0
    block = tile
    y = y0
    column = column0
    out = out0
    if SIBLINGS > 1:
        if tile >= first1:
            sibling = 1
            block = tile - first1
            y = y1
            column = column1
            out = out1
    if SIBLINGS > 2:
        if tile >= first2:
            sibling = 2
            block = tile - first2
            y = y2
            column = column2
            out = out2
    if SIBLINGS > 3:
        if tile >= first3:
            sibling = 3
            block = tile - first3
            y = y3
            column = column3
            out = out3
    return sibling, block, y, column, out


@triton.jit
def expanding(entry, WEIGHT: tl.constexpr):
    """What expand reads of a table's entry: (B, the addresses of c and d, the rank, the scale)."""
    b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(WEIGHT)), 16)
    scale = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
    return b, tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4).to(tl.int32), scale


@triton.jit
def tile_of_b(b, r, rank, n, out):
    """B's rows r, (ranks, channels), zeros past the rank."""
    mask = (r < rank)[:, None] & (n < out)[None, :]
    return tl.load(b + ((r * out)[:, None] + n[None, :]), mask=mask, other=0.0)


@triton.jit
def channels(value, c, d, n, out):
    """c ⊙ value + d along the last axis, for the channels n; c and d are addresses, 0 for ones and zeros."""
    if c != 0:
        value = value * tl.load(c.to(tl.pointer_type(tl.float32)) + n, mask=n < out, other=0.0)
    if d != 0:
        value = value + tl.load(d.to(tl.pointer_type(tl.float32)) + n, mask=n < out, other=0.0)
    return value
