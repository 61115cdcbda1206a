"""Attention over the paged cache as operators of torch.

transformers calls FlashAttention's `flash_attn_with_kvcache` for batches of one token a row, in Python that no compiler
sees through: a compiled model falls apart at every layer. As an operator it leaves one graph of the whole model, and
what is the same for all layers is computed once. Where lorakit's own kernel is the faster one, the operator launches
that.

For a batch in which a prompt begins, transformers copies all that its rows have in the cache, so that a row that has
long been there pays for each one that comes: on Llama-2-7B with 64 rows, such a forward takes twice as long as one
without a prompt. A second operator reads the cache where it is.

Part of `batching.py`, and bound to the same versions of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lorakit.errors import EngineError
from lorakit.runtime import ops

IMPLEMENTATIONS = ("flash_attention_2", "flash_attention_3")
"""Whose batches are the operators'."""

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


# `keys` and `values` are written, but by this operator alone, and each call has its own: for a compiler it is as good
# as pure. Told of the writing, it would copy the cache, as all layers' parts are views of one tensor.
@torch.library.custom_op("lorakit::paged_attention", mutates_args=())
def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    tickets: torch.Tensor,
    scale: float,
    implementation: str,
) -> torch.Tensor:
    """Appends a token to each row's cache, and attends to all of it.

    Args:
        query: (n, heads, head size), a token of each row; contiguous, as `key` and `value`.
        key: (n, key-value heads, head size), its key.
        value: as `key`.
        keys: (blocks, tokens of a block, key-value heads, head size), the cache of a layer.
        values: as `keys`.
        lengths: (n,) int32, tokens that each row's cache has.
        table: (n, most blocks of a row) int32, which blocks they are in.
        tickets: (n · key-value heads,) int32, zeros before and after.
        scale: multiplies the products of queries and keys.
        implementation: "flash_attention_2" or "flash_attention_3", for what lorakit's kernel does not take.

    Returns:
        (n, heads, head size), contiguous.
    """
    if ops.has_kernels(query.device, query.dtype) and ops.can_attend(query, key, keys, values):
        return ops.attend(query, key, value, keys, values, lengths, table, tickets, scale)
    return by_flash_attention(query, key, value, keys, values, lengths, table, scale, implementation)


def by_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    implementation: str,
) -> torch.Tensor:
    """`paged_attention`, by FlashAttention; arguments as there."""
    (_, _, flash, _, _), (_, arguments) = lazy_import_flash_attention(implementation)
    named = arguments(
        query_length=1,
        key_length=1,
        is_causal=True,
        softmax_scale=scale,
        block_table=table,
        cache_seqlens=lengths,
    )
    out = flash(query.unsqueeze(1), keys, values, key.unsqueeze(1), value.unsqueeze(1), **named)
    out = out[0] if isinstance(out, tuple) else out
    return cast(torch.Tensor, out.view(query.shape))


@paged_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


# As for `paged_attention`, the cache is written by this operator alone.
@torch.library.custom_op("lorakit::mixed_attention", mutates_args=())
def mixed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    begins: torch.Tensor,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    ends: torch.Tensor,
    singles: torch.Tensor,
    table: torch.Tensor,
    tickets: torch.Tensor,
    scale: float,
    implementation: str,
) -> torch.Tensor:
    """Appends the tokens of each row to its cache, and has them attend to all of it, each to those before it.

    Args:
        query: (n, heads, head size), the rows' tokens, one row behind the other; contiguous, as `key` and `value`.
        key: (n, key-value heads, head size).
        value: as `key`.
        keys: (blocks, tokens of a block, key-value heads, head size), the cache of a layer.
        values: as `keys`.
        places: (n,) int64, where in the cache each token goes; one that pads the batch goes where nobody reads.
        begins: (rows + 1,) int32, the first token of each row, and the number of all without those that pad.
        prompts: (rows + 1,) int32, the same, but the first rows that have one token each have none.
        lengths: (rows,) int32, the tokens that each row has then, with its new ones.
        ends: (rows + 1,) int32, their sums.
        singles: (rows,) int32, the tokens that the first rows of one token each had before; -1 for all others.
        table: (rows, most blocks of a row) int32, the blocks that the tokens are in.
        tickets: (rows · key-value heads,) int32, zeros before and after.
        scale: multiplies the products of queries and keys.
        implementation: "flash_attention_2" or "flash_attention_3".

    Returns:
        (n, heads, head size), contiguous; anything for tokens that pad the batch.
    """
    for kept, new in ((keys, key), (values, value)):
        kept.view(-1, *kept.shape[2:]).index_copy_(0, places, new)
    if not (ops.has_kernels(query.device, query.dtype) and ops.can_attend(query, key, keys, values)):
        return _prompts_by_flash_attention(query, keys, values, begins, lengths, ends, table, scale, implementation)
    out = _prompts_by_flash_attention(query, keys, values, prompts, lengths, ends, table, scale, implementation)
    first = slice(len(singles))  # Rows of one token are their own tokens, as they come first.
    ops.attend(query[first], key[first], value[first], keys, values, singles, table, tickets, scale, out[first])
    return out


def _prompts_by_flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begins: torch.Tensor,
    lengths: torch.Tensor,
    ends: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    implementation: str,
) -> torch.Tensor:
    """Tokens attend to what their rows have in the cache, which they are part of; see `mixed_attention`."""
    (_, varlen, cached, _, _), (of_varlen, of_cached) = lazy_import_flash_attention(implementation)
    named: dict[str, Any] = {
        "query_length": len(query),
        "key_length": len(query),
        "is_causal": True,
        "softmax_scale": scale,
        "block_table": table,
        "max_seqlen_q": len(query),
    }
    if implementation == "flash_attention_2":  # whose function for caches takes as many tokens of each row
        longest = table.shape[1] * keys.shape[1]
        arguments = of_varlen(**named, max_seqlen_k=longest)
        out = varlen(query, keys, values, cu_seqlens_q=begins, cu_seqlens_k=ends, **arguments)
    else:
        arguments = of_cached(**named, cache_seqlens=lengths)
        if _takes_splits(cached):
            # Prompts have tokens enough; left to itself it would cut rows as if they filled their table.
            arguments["num_splits"] = 1
        out = cached(query, keys, values, cu_seqlens_q=begins, **arguments)
    out = out[0] if isinstance(out, tuple) else out
    return cast(torch.Tensor, out.view(query.shape))


@cache
def _takes_splits(function: Callable[..., Any]) -> bool:
    """Whether a function of FlashAttention is told into how many parts rows are cut; asked once, not in each layer."""
    return "num_splits" in inspect.signature(function).parameters


@mixed_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


class CachedRows(NamedTuple):
    """What rows of one token each have in a cache.

    Attributes:
        lengths: (n,) int32, their tokens.
        table: (n, most blocks of a row) int32, the blocks that these are in.
        tickets: (n · key-value heads,) int32, zeros, by which programs of a kernel find out which of them is the last.
    """

    lengths: torch.Tensor
    table: torch.Tensor
    tickets: torch.Tensor


class MixedRows(NamedTuple):
    """What rows of any numbers of tokens have in a cache: arguments of `mixed_attention`."""

    places: torch.Tensor
    begins: torch.Tensor
    prompts: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor
    singles: torch.Tensor
    table: torch.Tensor
    tickets: torch.Tensor


RowsInCache: TypeAlias = dict[str, CachedRows] | dict[str, MixedRows]
"""By kind of layer."""


def cached_rows(batch: dict[str, Any], table: torch.Tensor | None = None) -> RowsInCache | None:
    """What the rows of a batch have in the cache, by kind of layer; None for prompts that are not read there.

    Args:
        batch: the arguments of a forward, as transformers makes them.
        table: (kinds of layer, rows, most blocks of a row) int32, for a batch with prompts that reads the cache where
            it is.
    """
    allocators = batch["cache"].cache_allocators.values()
    if batch["block_table"] is not None:
        return {allocator.layer_type: _rows_of(allocator, batch) for allocator in allocators}
    if table is not None:
        return {allocator.layer_type: _mixed_rows_of(allocator, batch, table) for allocator in allocators}
    return None


def _rows_of(allocator: Any, batch: dict[str, Any]) -> CachedRows:
    lengths = batch["cu_seq_lens_k"][allocator.layer_type].diff() - 1
    tickets = lengths.new_zeros(len(lengths) * allocator.num_key_value_heads)
    return CachedRows(lengths, batch["block_table"][allocator.index], tickets)


def _mixed_rows_of(allocator: Any, batch: dict[str, Any], table: torch.Tensor) -> MixedRows:
    places, ends = batch["write_index"][allocator.index], batch["cu_seq_lens_k"][allocator.layer_type]
    return mixed_rows(places, batch["cu_seq_lens_q"], ends, table[allocator.index], allocator.num_key_value_heads)


def mixed_rows(
    places: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, table: torch.Tensor, heads: int
) -> MixedRows:
    """What `mixed_attention` is given of a batch; `heads` are those of keys and values."""
    lengths = ends.diff()
    single = begins.diff().eq(1).cumprod(0)  # until the first row that has more, or pads the batch
    return MixedRows(
        places=places,
        begins=begins,
        prompts=begins.clamp(min=single.sum()),
        lengths=lengths,
        ends=ends,
        singles=torch.where(single.bool(), lengths - 1, -1),
        table=table,
        tickets=lengths.new_zeros(len(lengths) * heads),
    )


def _with_operator(attention: Attention, implementation: str) -> Attention:
    """transformers' attention function, but for the batches that are the operator's."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        cached_rows: RowsInCache | set[bool] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        plain = all(kwargs.get(name) is None for name in ("sliding_window", "softcap", "s_aux"))
        plain = plain and query.dtype != torch.float32 and query.shape[-1] == value.shape[-1]
        if isinstance(cached_rows, set):  # which only wants to know
            cached_rows.add(plain)
            cached_rows = None
        layer = cast(int, module.layer_idx)
        if cached_rows is None or not plain:
            if any(isinstance(rows, MixedRows) for rows in (cached_rows or {}).values()):
                # transformers would find nothing of what was there before.
                raise EngineError(
                    f"layer {layer} ({type(module).__name__}) calls attention with other arguments than before: please "
                    "report its architecture; meanwhile load the base with attn_implementation='sdpa'."
                )
            return attention(module, query, key, value, *args, **kwargs)
        allocator = cast(Any, kwargs["cache"]).layer_to_allocator[layer]
        rows = cached_rows[allocator.layer_type]
        keys, values = allocator.get_cache_for_block_table(layer)
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        # (1, heads, n, size) → (n, heads, size): already so where it is not compiled, and a compiler writes it so.
        given = [one[0].transpose(0, 1).contiguous() for one in (query, key, value)]
        operator = mixed_attention if isinstance(rows, MixedRows) else paged_attention
        return operator(*given, keys, values, *rows, scale, implementation).unsqueeze(0), None

    return attend


# Batches of other models, and of this one without the engine, have no `cached_rows`: for them nothing changes.
for _implementation in IMPLEMENTATIONS:
    AttentionInterface.register(
        _implementation, _with_operator(ALL_ATTENTION_FUNCTIONS[_implementation], _implementation)
    )
