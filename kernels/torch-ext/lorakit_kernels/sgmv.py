"""Segmented gather matrix-vector multiplication (Punica, arXiv 2310.18547): every row of a batch by its own adapter.

y ← c ⊙ (y + s · B A x) + d for up to four sibling modules that share x, in two launches: `shrink` gives the sums A x,
`expand_` adds s · B of them to y in place. Which kernels run is set by shapes alone, so both may be captured in a CUDA
graph; slots, ranks and addresses are read from `table` and `plan` on the device at every replay.

A compiled model calls them as operators of torch.library, without a break; elsewhere they are launched as they stand,
which saves the operator's own time.

`replace_` is for adapters that bring a module's whole weight.

Table and plan are read before the kernel ahead in the stream has ended, so that kernel may not be the one that writes
them. A copy is no kernel, and whatever ran before the base's product has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import decode, embedding, prefill, whole
from .limits import MOST_SIBLINGS, RANKS
from .namespace import add_op_namespace_prefix
from .tuning import tiles


def _path(values: Tensor, tokens: int, weight: torch.dtype, max_rank: int) -> tuple[Any, Any]:
    """The kernels and their tiles, for x or y of this shape and dtype."""
    found = tiles(values.device)
    if tokens <= found.decode_tokens:
        return decode, found.decode.of(weight)
    return prefill, found.for_prefill(values, weight, max_rank)


def _room(x: Tensor, siblings: int, max_rank: int, weight: torch.dtype) -> Tensor:
    """What shrink gives, not yet filled."""
    assert 1 <= siblings <= MOST_SIBLINGS and max_rank % RANKS == 0
    tokens, in_features = x.shape
    kernels, tile = _path(x, tokens, weight, max_rank)
    return x.new_empty((siblings, tokens, kernels.splits(in_features, tile), max_rank), dtype=torch.float32)


def shrink(
    x: Tensor,
    table: Tensor,
    plan: Tensor,
    columns: Sequence[int],
    max_rank: int,
    weight: torch.dtype,
    segments: int = 0,
) -> Tensor:
    """The sums A x of every row that has an adapter.

    Args:
        x: (tokens, in) fp32, bf16 or fp16, contiguous.
        table: (slots, modules, 8) int64, see `entries`.
        plan: (rows, 8) int32, see `plan`; tokens is a multiple of rows, a row's tokens lie together.
        columns: the siblings' places among the table's modules, one to four.
        max_rank: no smaller than any rank in use; a multiple of 16.
        weight: the dtype of A and B.
        segments: no fewer than the plan's segments; 0: as many as rows. Where rows are single tokens of few slots, it
            spares programs that would find nothing to do.

    Returns:
        (siblings, tokens, splits, max_rank) fp32, to be summed over splits; undefined for rows without an adapter.
    """
    run = _shrink_operator if torch.compiler.is_compiling() else _shrink
    return run(x, table, plan, columns, max_rank, weight, segments)


def _shrink(
    x: Tensor,
    table: Tensor,
    plan: Tensor,
    columns: Sequence[int],
    max_rank: int,
    weight: torch.dtype,
    segments: int = 0,
) -> Tensor:
    assert x.is_contiguous()
    h = _room(x, len(columns), max_rank, weight)
    kernels, tile = _path(x, x.shape[0], weight, max_rank)
    kernels.shrink(x, h, table, plan, columns, weight, tile, segments)
    return h


_shrink_operator = torch.library.custom_op(add_op_namespace_prefix("shrink"), _shrink, mutates_args=())


@_shrink_operator.register_fake
def _(x, table, plan, columns, max_rank, weight, segments=0):
    return _room(x, len(columns), max_rank, weight)


def lookup(ids: Tensor, table: Tensor, plan: Tensor, column: int, max_rank: int, weight: torch.dtype) -> Tensor:
    """`shrink` for an embedding: A's column of every token.

    Args:
        ids: (tokens,) int32 or int64.
        table: as in `shrink`; A is (vocabulary, r).
        plan: as in `shrink`.
        column: the module's place in the table.
        max_rank: as in `shrink`.
        weight: as in `shrink`.

    Returns:
        (1, tokens, 1, max_rank) fp32.
    """
    run = _lookup_operator if torch.compiler.is_compiling() else _lookup
    return run(ids, table, plan, column, max_rank, weight)


def _lookup(ids: Tensor, table: Tensor, plan: Tensor, column: int, max_rank: int, weight: torch.dtype) -> Tensor:
    h = ids.new_empty((1, ids.shape[0], 1, max_rank), dtype=torch.float32)
    embedding.lookup(ids, h, table, plan, column, weight)
    return h


_lookup_operator = torch.library.custom_op(add_op_namespace_prefix("lookup"), _lookup, mutates_args=())


@_lookup_operator.register_fake
def _(ids, table, plan, column, max_rank, weight):
    return ids.new_empty((1, ids.shape[0], 1, max_rank), dtype=torch.float32)


def expand_(
    ys: Sequence[Tensor],
    h: Tensor,
    table: Tensor,
    plan: Tensor,
    columns: Sequence[int],
    weight: torch.dtype,
    segments: int = 0,
) -> None:
    """Applies y ← c ⊙ (y + s · B h) + d in place, for every row that has an adapter; others keep their bits.

    Args:
        ys: the siblings' outputs, each (tokens, out) of x's dtype, contiguous.
        h: what `shrink` or `lookup` gave.
        table: as in `shrink`.
        plan: as in `shrink`.
        columns: as in `shrink`.
        weight: as in `shrink`.
        segments: as in `shrink`.
    """
    run = _expand_operator if torch.compiler.is_compiling() else _expand
    run(ys, h, table, plan, columns, weight, segments)


def _expand(
    ys: Sequence[Tensor],
    h: Tensor,
    table: Tensor,
    plan: Tensor,
    columns: Sequence[int],
    weight: torch.dtype,
    segments: int = 0,
) -> None:
    assert all(y.is_contiguous() for y in ys)
    kernels, tile = _path(ys[0], h.shape[1], weight, h.shape[-1])
    kernels.expand(ys, h, table, plan, columns, weight, tile, segments)


_expand_operator = torch.library.custom_op(add_op_namespace_prefix("expand_"), _expand, mutates_args=("ys",))


@_expand_operator.register_fake
def _(ys, h, table, plan, columns, weight, segments=0):
    assert 1 <= len(ys) == len(columns) <= MOST_SIBLINGS


def replace_(
    y: Tensor, x: Tensor, table: Tensor, plan: Tensor, column: int, weight: torch.dtype, segments: int = 0
) -> None:
    """Writes s · w x + d to y, for every row whose adapter brings a whole weight; others keep their bits.

    At an embedding, w x is a row of w, and there is no d.

    Args:
        y: (tokens, out) of x's dtype, or of any for ids; contiguous. What stands there is not used.
        x: (tokens, in) fp32, bf16 or fp16, contiguous; or (tokens,) ids of an embedding, int32 or int64.
        table: as in `shrink`; w is (out, in), an embedding's (vocabulary, out).
        plan: as in `shrink`.
        column: the module's place in the table.
        weight: the dtype of w.
        segments: as in `shrink`.
    """
    run = _replace_operator if torch.compiler.is_compiling() else _replace
    run(y, x, table, plan, column, weight, segments)


def _replace(
    y: Tensor, x: Tensor, table: Tensor, plan: Tensor, column: int, weight: torch.dtype, segments: int = 0
) -> None:
    assert y.is_contiguous() and x.is_contiguous()
    if x.ndim == 1:
        whole.embedding(x, y, table, plan, column, weight)
    else:
        whole.linear(x, y, table, plan, column, weight, segments)


_replace_operator = torch.library.custom_op(add_op_namespace_prefix("replace_"), _replace, mutates_args=("y",))


@_replace_operator.register_fake
def _(y, x, table, plan, column, weight, segments=0):
    assert y.ndim == 2
