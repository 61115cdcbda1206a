"""Attention over the paged cache as one operator of torch.

transformers calls FlashAttention's `flash_attn_with_kvcache` for batches of one token a row, in Python that no compiler
sees through: a compiled model falls apart at every layer. As an operator it leaves one graph of the whole model, and
what is the same for all layers is computed once. Where lorakit's own kernel is the faster one, the operator launches
that.

Part of `batching.py`, and bound to the same versions of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from lorakit.runtime import ops

_IMPLEMENTATIONS = ("flash_attention_2", "flash_attention_3")

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


class CachedRows(NamedTuple):
    """What rows have in a cache.

    Attributes:
        lengths: (n,) int32, their tokens.
        table: (n, most blocks of a row) int32, the blocks that these are in.
        tickets: (n · key-value heads,) int32, zeros, by which programs of a kernel find out which of them is the last.
    """

    lengths: torch.Tensor
    table: torch.Tensor
    tickets: torch.Tensor


def cached_rows(batch: dict[str, Any]) -> dict[str, CachedRows] | None:
    """What the rows of a batch have in the cache, by kind of layer; None for a batch of prompts.

    Args:
        batch: the arguments of a forward, as transformers makes them.
    """
    if batch["block_table"] is None:
        return None
    return {allocator.layer_type: _rows_of(allocator, batch) for allocator in batch["cache"].cache_allocators.values()}


def _rows_of(allocator: Any, batch: dict[str, Any]) -> CachedRows:
    lengths = batch["cu_seq_lens_k"][allocator.layer_type].diff() - 1
    tickets = lengths.new_zeros(len(lengths) * allocator.num_key_value_heads)
    return CachedRows(lengths, batch["block_table"][allocator.index], tickets)


def _with_operator(attention: Attention, implementation: str) -> Attention:
    """transformers' attention function, but for the batches that are the operator's."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        cached_rows: dict[str, CachedRows] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        plain = all(kwargs.get(name) is None for name in ("sliding_window", "softcap", "s_aux"))
        if cached_rows is None or not plain or query.dtype == torch.float32 or query.shape[-1] != value.shape[-1]:
            return attention(module, query, key, value, *args, **kwargs)
        cache: Any = kwargs["cache"]
        layer = cast(int, module.layer_idx)
        allocator = cache.layer_to_allocator[layer]
        keys, values = allocator.get_cache_for_block_table(layer)
        scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
        rows = cached_rows[allocator.layer_type]
        # (1, heads, n, size) → (n, heads, size): already so where it is not compiled, and a compiler writes it so.
        given = [one[0].transpose(0, 1).contiguous() for one in (query, key, value)]
        return paged_attention(*given, keys, values, *rows, scale, implementation).unsqueeze(0), None

    return attend


# Batches of other models, and of this one without the engine, have no `cached_rows`: for them nothing changes.
for _implementation in _IMPLEMENTATIONS:
    AttentionInterface.register(
        _implementation, _with_operator(ALL_ATTENTION_FUNCTIONS[_implementation], _implementation)
    )
