"""Whether batches in which prompts begin can read the paged cache where it is.

Not every layer's attention is what the operators of `attention.py` compute, and not every build of FlashAttention reads
the rows of prompts by a table of blocks. So both are tried once, before an engine counts on them: the layers by the
runner, in its first forward, the operator here, on a few tokens.

Part of `batching.py`, and bound to the same versions of transformers.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any

import torch

from lorakit.engine.attention import IMPLEMENTATIONS, mixed_attention, mixed_rows
from lorakit.runtime import ops

_log = logging.getLogger(__name__)

_TOLERANCE = 0.05
"""Of 16 bits, relative to the largest number that is expected for a token."""

_SHARPNESS = 4.0
"""Scores are so many times larger than usual: then single keys tell."""


def may_read_in_place(config: Any, cache: Any) -> bool:
    """Whether a base's cache is one that the operators can read.

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
    )


def takes_wide_tables(cache: Any, group: int, implementation: str) -> bool:
    """Whether decoding a short row takes no longer for a table that has room for long ones.

    FlashAttention 2 cuts rows into parts as if each filled its table; FlashAttention 3 and lorakit's kernel look first.

    Args:
        cache: as for `operator_works`, as `group` and `implementation`.
        group: see there.
        implementation: see there.
    """
    if implementation != "flash_attention_2":
        return True
    allocator = next(iter(cache.cache_allocators.values()))
    keys, values = allocator.get_cache_for_block_table(allocator.layer_indices[0])
    heads, size = keys.shape[2:]
    query, key = (keys.new_empty(1, count, size) for count in (group * heads, heads))
    return ops.has_kernels(query.device, query.dtype) and ops.can_attend(query, key, keys, values)


def operator_works(cache: Any, group: int, implementation: str) -> bool:
    """Whether `mixed_attention` gives what attention is, for the base's heads and the cache's blocks.

    Args:
        cache: transformers' paged cache.
        group: how many heads of queries share one of keys and values.
        implementation: see `mixed_attention`.
    """
    try:
        error = _error(cache, group, implementation)
    except Exception as reason:  # noqa: BLE001 - whatever an unknown build raises, copies do without it
        _log.warning("For prompts, rows are copied from the cache: reading them there was tried, and raised %r", reason)
        return False
    if not error < _TOLERANCE:
        _log.warning(
            "For prompts, rows are copied from the cache: reading them there was tried, and erred by %.2g", error
        )
        return False
    return True


def _error(cache: Any, group: int, implementation: str) -> float:
    """The largest error of the operator, of a batch of all kinds of rows."""
    (allocator,) = cache.cache_allocators.values()
    heads, size, page = allocator.num_key_value_heads, allocator.head_dim, allocator.tokens_per_page
    # Rows that are decoded, rows of prompts with and without tokens before, and tokens that pad the batch.
    counts, befores, pad = [1, 1, 3, 40], [page + 9, 0, 2, max(0, page - 7)], 4
    totals = [count + before for count, before in zip(counts, befores, strict=True)]
    used = -(-max(totals) // page)
    blocks = len(counts) * used
    table = torch.full((len(counts), max(used, cache.max_blocks_per_request)), -1)
    table[:, :used] = torch.arange(blocks).flip(0).view(-1, used)
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

    query, (key, value) = random(len(places) + pad, group * heads, size), random(2, len(places) + pad, heads, size)
    keys, values = random(2, blocks + 1, page, heads, size)
    rows = mixed_rows(
        torch.tensor([*places, *[blocks * page] * pad], device=cache.device),
        sums(counts),
        sums(totals),
        table.to(cache.device, torch.int32),
        heads,
    )
    scale = _SHARPNESS * size**-0.5
    found = mixed_attention(query, key, value, keys, values, *rows, scale, implementation)
    expected = _expected(query, keys, values, scale, counts, totals, table)
    errors = (found[: len(places)] - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
    return float(errors.max())


def _expected(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    counts: list[int],
    totals: list[int],
    table: torch.Tensor,
) -> torch.Tensor:
    """(tokens, heads, size) in fp32 or better: softmax(scale · q Kᵀ) V over a token's row, up to itself."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    group, outs, begin = query.shape[1] // keys.shape[2], [], 0
    for count, total, blocks in zip(counts, totals, table.tolist(), strict=True):
        own = query[begin : begin + count].to(dtype).transpose(0, 1)
        k, v = (
            cache[blocks[: -(-total // cache.shape[1])]]
            .flatten(0, 1)[:total]
            .to(dtype)
            .repeat_interleave(group, 1)
            .transpose(0, 1)
            for cache in (keys, values)
        )
        later = torch.ones(count, total, dtype=torch.bool, device=query.device).triu(total - count + 1)
        scores = (own @ k.transpose(1, 2) * scale).masked_fill(later, float("-inf"))
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += count
    return torch.cat(outs)
