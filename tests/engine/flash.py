"""PyTorch in the place of FlashAttention's functions: slow, on any device, in any dtype."""

from itertools import pairwise

import torch
from transformers.modeling_flash_attention_utils import _lazy_define_process_function


def attended(queries, keys, values, scale):
    """(n, heads, size) the last n of (length, key heads, size), each to those up to itself; in fp32 or better."""
    dtype, repeats = queries.dtype, queries.shape[1] // keys.shape[1]
    queries, keys, values = (one.to(torch.promote_types(dtype, torch.float32)) for one in (queries, keys, values))
    keys, values = (one.repeat_interleave(repeats, 1).transpose(0, 1) for one in (keys, values))
    scores = queries.transpose(0, 1) @ keys.transpose(1, 2) * scale
    n, length = scores.shape[1:]
    later = torch.ones(n, length, dtype=torch.bool).tril(length - n).logical_not()
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ values).transpose(0, 1).to(dtype)


def of_blocks(cache, blocks, length):
    """(length, heads, size) of a cache (blocks, tokens, heads, size)."""
    return cache[blocks[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, page_table=None, cu_seqlens_q=None, max_seqlen_q=None,
    softmax_scale=None, causal=False,
):  # fmt: skip
    """As FlashAttention 3's `flash_attn_with_kvcache`: (n, 1, heads, size) with new keys, or (tokens, heads, size)."""
    assert causal
    if cu_seqlens_q is not None:
        assert k is None and v is None and max_seqlen_q == len(q)
        return _rows(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale)
    page = k_cache.shape[1]
    for row, (length, blocks) in enumerate(zip(cache_seqlens.tolist(), page_table.tolist(), strict=True)):
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[blocks[length // page], length % page] = new[row, 0]
    begins = torch.arange(len(q) + 1)
    return _rows(q[:, 0], k_cache, v_cache, begins, cache_seqlens + 1, page_table, softmax_scale)[:, None]


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, block_table=None
):
    """As FlashAttention 2's `flash_attn_varlen_func`: (tokens, heads, size)."""
    assert causal and max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
    if block_table is not None:
        return _rows(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale)
    out = torch.full_like(q, float("nan"))
    for (begin, end), (first, last) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        if end > begin:
            out[begin:end] = attended(q[begin:end], k[first:last], v[first:last], softmax_scale)
    return out


def _rows(q, k_cache, v_cache, begins, lengths, table, scale):
    # What no row has is not written.
    out = torch.full_like(q, float("nan"))
    for row, length in enumerate(lengths.tolist()):
        begin, end = begins[row : row + 2].tolist()
        if end > begin:
            given = (of_blocks(cache, table[row], length) for cache in (k_cache, v_cache))
            out[begin:end] = attended(q[begin:end], *given, scale)
    return out


def functions(varlen=varlen, with_kvcache=with_kvcache):
    """As transformers' `lazy_import_flash_attention` gives them."""
    return (
        (None, varlen, with_kvcache, None, None),
        (_lazy_define_process_function(varlen), _lazy_define_process_function(with_kvcache)),
    )


def append_and_attend(query, key, value, keys, values, lengths, table, tickets, scale, out=None):
    """As `lorakit_kernels.attend`."""
    assert not tickets.any()
    fills, out = out is None, torch.zeros_like(query) if out is None else out
    for row, length in enumerate(lengths.tolist()):
        if length < 0:
            continue
        for cache, new in ((keys, key), (values, value)):
            cache[table[row, length // cache.shape[1]], length % cache.shape[1]] = new[row]
        given = (of_blocks(cache, table[row], length + 1) for cache in (keys, values))
        out[row] = attended(query[row : row + 1], *given, scale)[0]
    assert fills or out.isfinite().any()
    return out
