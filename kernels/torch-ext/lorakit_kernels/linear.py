"""Linear modules that share x, in one launch where that is faster: the base's own part of y ← c ⊙ (y + s · B A x) + d.

Sums are fp32, over the input's width in one order, and rounded once. So a token's bits do not depend on what shares its
batch; they may differ from cuBLAS's, which sums in orders of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dense
from .limits import MOST_SIBLINGS
from .namespace import add_op_namespace_prefix
from .tuning import tiles


def can_join(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether `linears` takes these, and is the faster way on x's device.

    Args:
        x: (..., in).
        weights: (out, in) each.
    """
    if not 2 <= len(weights) <= MOST_SIBLINGS or not x.is_cuda:
        return False
    tile = tiles(x.device).dense
    alike = all(w.dtype == x.dtype and w.device == x.device and w.is_contiguous() for w in weights)
    return tile is not None and alike and dense.fits(x, tile)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> list[Tensor]:
    """W x (+ bias) of up to four modules.

    Args:
        x: (tokens, in) bf16 or fp16, contiguous.
        weights: (out, in) each, of x's dtype, contiguous.
        biases: (out,) each, of x's dtype; all of the modules have one, or none.

    Returns:
        (tokens, out) each, of x's dtype, contiguous.
    """
    run = _linears_operator if torch.compiler.is_compiling() else _linears
    return run(x, weights, biases)


def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    assert x.is_contiguous() and len(biases) in (0, len(weights))
    tile = tiles(x.device).dense
    assert tile is not None, "asked of `can_join`"
    ys = _room(x, weights)
    dense.products(x, weights, biases, ys, tile)
    return ys


def _room(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], w.shape[0])) for w in weights]


_linears_operator = torch.library.custom_op(add_op_namespace_prefix("linears"), _linears, mutates_args=())


@_linears_operator.register_fake
def _(x, weights, biases):
    return _room(x, weights)
