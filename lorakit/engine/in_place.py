"""Whether batches in which prompts begin can read the paged cache where it is.

Not every layer's attention is what the operators of `attention.py` compute, and not every build of FlashAttention reads
the rows of prompts by a table of blocks. So it is tried once, on a few tokens, before an engine counts on it.

Part of `batching.py`, and bound to the same versions of transformers.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any

import torch

from lorakit.engine.attention import IMPLEMENTATIONS, mixed_attention, mixed_rows

_log = logging.getLogger(__name__)

_TOLERANCE = 0.02
"""Of 16 bits, relative to the largest of what is expected."""


def reads_in_place(config: Any, cache: Any) -> bool:
    """Whether no batch of a base needs a copy of what its rows have in the cache.

    Args:
        config: the base's, of its text.
        cache: transformers' paged cache.
    """
    kinds = [allocator.layer_type for allocator in cache.cache_allocators.values()]
    return (
        config._attn_implementation in IMPLEMENTATIONS
        and cache.max_decode_fast_path_length > 0
        and kinds == ["full_attention"]
        and cache.dtype != torch.float32
        # Bases whose attention has more arguments than the operators.
        and not any(getattr(config, name, None) for name in ("attn_logit_softcapping", "v_head_dim"))
        and config.model_type != "gpt_oss"
        and _works(config, cache)
    )


def _works(config: Any, cache: Any) -> bool:
    """Whether the operator gives what attention is, for the base's heads and the cache's blocks."""
    (allocator,) = cache.cache_allocators.values()
    heads, size, page = allocator.num_key_value_heads, allocator.head_dim, allocator.tokens_per_page
    queries = config.num_attention_heads // config.num_key_value_heads * heads
    # Rows that are decoded, rows of prompts with and without tokens before, and tokens that pad the batch.
    counts, befores, pad = [1, 1, 3, 7], [page + 1, 0, 2, max(0, page - 3)], 4
    totals = [count + before for count, before in zip(counts, befores, strict=True)]
    blocks = len(counts) * -(-max(totals) // page)
    table = torch.arange(blocks).flip(0).view(len(counts), -1)
    places = [
        int(table[row, token // page]) * page + token % page
        for row, (total, before) in enumerate(zip(totals, befores, strict=True))
        for token in range(before, total)
    ]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(cache.device, cache.dtype)

    def sums(numbers: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(numbers)], dtype=torch.int32, device=cache.device)

    query, (key, value) = random(len(places) + pad, queries, size), random(2, len(places) + pad, heads, size)
    keys, values = random(2, blocks + 1, page, heads, size)
    rows = mixed_rows(
        torch.tensor([*places, *[blocks * page] * pad], device=cache.device),
        sums(counts),
        sums(totals),
        table.to(cache.device, torch.int32),
        heads,
    )
    try:
        found = mixed_attention(query, key, value, keys, values, *rows, size**-0.5, config._attn_implementation)
        expected = _expected(query, keys, values, counts, totals, table)
        error = float((found[: len(places)] - expected).abs().max() / expected.abs().max())
    except Exception as reason:  # noqa: BLE001 - whatever an unknown build raises, copies do without it
        _log.info("Prompts' rows are copied from the cache, as FlashAttention does not read them there: %s", reason)
        return False
    if not error < _TOLERANCE:
        _log.warning("Prompts' rows are copied from the cache, as FlashAttention errs by %.2g there.", error)
        return False
    return True


def _expected(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: list[int],
    totals: list[int],
    table: torch.Tensor,
) -> torch.Tensor:
    """(tokens, heads, size) in fp32 or better: softmax(q Kᵀ / √size) V over a token's row, up to itself."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group, outs, begin = query.shape[1] // keys.shape[2], [], 0
    for count, total, blocks in zip(counts, totals, table.tolist(), strict=True):
        own = query[begin : begin + count].to(dtype).transpose(0, 1)
        k, v = (
            cache[blocks].flatten(0, 1)[:total].to(dtype).repeat_interleave(group, 1).transpose(0, 1)
            for cache in (keys, values)
        )
        later = torch.ones(count, total, dtype=torch.bool, device=query.device).triu(total - count + 1)
        scores = (own @ k.transpose(1, 2) * query.shape[2] ** -0.5).masked_fill(later, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += count
    return torch.cat(outs)
