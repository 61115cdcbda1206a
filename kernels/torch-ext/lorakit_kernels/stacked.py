"""Segmented LoRA by stacked matrix products, in plain torch: the path for the CPU, and for any device without kernels.

The factors of a batch's adapters are stacked once, when the batch is formed; every forward then takes two batched
products a module, whatever the number of adapters. Per token at a module of one stack with S segments of k rows:

    bytes       S·r·(in + out)·4 for the factors, S·k·(2·in + 3·out)·4 for x and y: the factors dominate decoding
    operations  2·S·k·r·(in + out)

A row's adapter is selected, never multiplied by a mask: NaN in one adapter reaches no other adapter's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stack:
    """Segments of one batch at one module that share a rank and a number of rows.

    A row here is one of the batch's `n` entries (a sequence); it brings t tokens, t being the same for all rows.

    Attributes:
        n: rows of the batch.
        index: (S·k,) int64, the rows in segment order, short segments padded by any rows, empty ones too; None when the
            segments are all rows in order.
        keep: (m,) int64, positions in `index` that are no padding; None without padding.
        target: (m,) int64, the rows that those positions are: `index[keep]`; None when `index` is.
        a: (S, r, in) in the compute dtype; an embedding's as (S, V, r). None for segments with no factors.
        b: (S, r, out), the scale multiplied in; None together with `a`.
        c: (S, 1, out) or None for ones.
        d: (S, 1, out) or None for zeros.
    """

    n: int
    index: Tensor | None
    keep: Tensor | None
    target: Tensor | None
    a: Tensor | None
    b: Tensor | None
    c: Tensor | None
    d: Tensor | None


def stacked_lora(y: Tensor, x: Tensor, stack: Stack, *, embedding: bool = False) -> Tensor:
    """Applies y ← c ⊙ (y + s · B A x) + d to the rows of a stack.

    Args:
        y: (..., out), what the base's module returned; n·t tokens, row-major. It is overwritten: out of place, an
            extra pass over y would cost more than the products of a decode step.
        x: (..., in), what the module was given; for an embedding the token ids (...) of any integer dtype.
        stack: the segments and their factors.
        embedding: whether x holds ids to look up in A.

    Returns:
        The result, of y's shape and dtype. Rows outside the stack are y's, bit for bit.
    """
    rows = y.reshape(stack.n, -1, y.shape[-1])  # (n, t, out)
    taken = rows if stack.index is None else rows.index_select(0, stack.index)
    first, *_ = (part for part in (stack.b, stack.c, stack.d) if part is not None)
    result = taken.reshape(first.shape[0], -1, y.shape[-1]).to(first.dtype)  # (S, k·t, out), a copy if y is narrower

    if stack.b is not None:
        result = result.baddbmm_(_look_up(x, stack) if embedding else _shrink(x, stack), stack.b)
    if stack.c is not None:
        result = result.mul_(stack.c)
    if stack.d is not None:
        result = result.add_(stack.d)

    result = result.to(y.dtype)
    if stack.index is None or stack.target is None:
        return result.reshape(y.shape)
    result = result.reshape(taken.shape)
    if stack.keep is not None:
        result = result.index_select(0, stack.keep)
    return rows.index_copy_(0, stack.target, result).reshape(y.shape)


@dataclass(frozen=True, eq=False)
class Whole:
    """A segment of one batch at a module for which it brings a whole weight. Such weights are never stacked.

    Attributes:
        n: rows of the batch.
        rows: (k,) int64, the segment's rows; None for all of them.
        w: (out, in); an embedding's as (V, out).
        d: (out,) fp32 or None for zeros.
        scale: what the product is multiplied by.
    """

    n: int
    rows: Tensor | None
    w: Tensor
    d: Tensor | None
    scale: float = 1.0


def replaced(y: Tensor, x: Tensor, whole: Whole, *, embedding: bool = False) -> Tensor:
    """Applies y ← s · w x + d to the rows of a segment, in the wider of x's and w's dtypes.

    Args:
        y: as in `stacked_lora`; what stands there is not used, and may be NaN.
        x: as in `stacked_lora`.
        whole: the segment and its weight.
        embedding: whether x holds ids, each a row of w.

    Returns:
        The result, of y's shape and dtype. Other rows are y's, bit for bit.
    """
    rows = y.reshape(whole.n, -1, y.shape[-1])
    taken = x.reshape(whole.n, -1) if embedding else x.reshape(whole.n, -1, x.shape[-1])
    if whole.rows is not None:
        taken = taken.index_select(0, whole.rows)
    if embedding:
        result = torch.nn.functional.embedding(taken, whole.w)
    else:
        dtype = torch.promote_types(x.dtype, whole.w.dtype)
        result = torch.nn.functional.linear(taken.to(dtype), whole.w.to(dtype))
    if whole.scale != 1:
        result = result * whole.scale
    if whole.d is not None:
        result = result + whole.d
    result = result.to(y.dtype)
    if whole.rows is None:
        return result.reshape(y.shape)
    return rows.index_copy_(0, whole.rows, result).reshape(y.shape)


def _shrink(x: Tensor, stack: Stack) -> Tensor:
    """x Aᵀ of each segment: (S, k·t, r)."""
    a = stack.a
    assert a is not None
    rows = x.reshape(stack.n, -1, x.shape[-1])
    if stack.index is not None:
        rows = rows.index_select(0, stack.index)
    return torch.bmm(rows.reshape(a.shape[0], -1, a.shape[2]).to(a.dtype), a.transpose(1, 2))


def _look_up(ids: Tensor, stack: Stack) -> Tensor:
    """A's columns of each segment's tokens: (S, k·t, r)."""
    a = stack.a
    assert a is not None
    rows = ids.reshape(stack.n, -1)
    if stack.index is not None:
        rows = rows.index_select(0, stack.index)
    segments, vocabulary, rank = a.shape
    offset = torch.arange(segments, device=ids.device).unsqueeze(1) * vocabulary
    return torch.nn.functional.embedding(rows.reshape(segments, -1) + offset, a.reshape(-1, rank))
