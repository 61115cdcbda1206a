"""SGMV in plain torch, segment by segment: what the kernels must compute. For tests; no attention to speed.

Takes what the kernels take, but weights as tensors instead of addresses, and computes in the dtype it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """One adapter at one module: y ← c ⊙ (y + s · B A x) + d, or y ← s · w x + d.

    Attributes:
        a: (r, in), or (vocabulary, r) for an embedding.
        b: (r, out).
        scale: s.
        c: (out,) or None for ones.
        d: (out,) or None for zeros.
        w: (out, in), or (vocabulary, out) for an embedding; None for the base's.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    c: Tensor | None = None
    d: Tensor | None = None
    w: Tensor | None = None


def sgmv(
    y: Tensor,
    x: Tensor,
    slots: Sequence[int],
    weights: Mapping[int, Weights],
    *,
    embedding: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Applies every row's adapter.

    Args:
        y: (tokens, out), the base's product.
        x: (tokens, in), or (tokens,) ids for an embedding.
        slots: the slot of each row, -1 for the base; a row has tokens / len(slots) tokens.
        weights: slot → its adapter; a slot that is missing leaves the module as it is.
        embedding: whether x holds ids.
        dtype: what to compute in.

    Returns:
        (tokens, out) of `dtype`.
    """
    out = y.to(dtype).clone().reshape(len(slots), -1, y.shape[-1])
    rows = x.reshape(len(slots), -1, *x.shape[1:])
    for row, slot in enumerate(slots):
        adapter = weights.get(slot)
        if slot < 0 or adapter is None:
            continue
        if adapter.w is not None:
            w = adapter.w.to(dtype)
            out[row] = adapter.scale * (w[rows[row]] if embedding else rows[row].to(dtype) @ w.T)
        if adapter.a is not None and adapter.b is not None:
            a = adapter.a.to(dtype)
            sums = a[rows[row]] if embedding else rows[row].to(dtype) @ a.T
            out[row] += adapter.scale * (sums @ adapter.b.to(dtype))
        if adapter.c is not None:
            out[row] *= adapter.c.to(dtype)
        if adapter.d is not None:
            out[row] += adapter.d.to(dtype)
    return out.reshape(y.shape)
