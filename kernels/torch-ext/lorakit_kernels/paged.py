"""Attention of a decode step over a paged cache: the new token of each row is appended, and attends to its whole row.

One launch does both, as the programs that attend to a row are given its new key and value anyway. What a row has is
read once, whatever number of queries share its keys.

Two numbers, for a row of L tokens with H heads of keys and values, d wide, and G queries to each (in brackets: 32 rows
of 208 tokens, and Llama-2-7B's 32 heads of 128, a query each):

    bytes       4·L·H·d     [109 MB]
    operations  4·L·H·d·G   [109 MFLOP]

Memory is the limit, if enough of it is under way at once. So a row's heads are programs of their own, and long rows are
cut into several; the last of these to end sums up. Queries are the matrix units' smaller operand, of which most is
padding: that is cheaper than to sum over threads.

The softmax is taken as tokens come (Milakov and Gimelshein 2018, FlashAttention), in fp32; its weights are rounded to
the dtype of the values before they are multiplied. How rows are cut depends on how many there are, so a row's last bits
may change with the batch; FlashAttention's do, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, takes_as_is
from .prefill import product
from .tuning import Paged, tiles

_LEAST = 512  # Tokens of a part, if a row has as many.
_PROGRAMS = 2048  # Rows are cut into parts up to so many programs: those with nothing to do are not free.
_PARTS = 16  # More take longer to sum up than they save.
_QUERIES = 16  # Of a tile, as the matrix units want it. More would not stay in registers.
_SIZES = (64, 128)  # Of a head. Tiles are of whole heads: of wider ones, too few would be under way.


@triton.jit
def attend_kernel(
    query, key, value, keys, values, lengths, table, tickets, out, parts, sums, scale, table_row,
    key_block, key_token, key_head, value_block, value_token, value_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    PARTS: tl.constexpr, LEAST: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EXACT: tl.constexpr, FILL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (head of keys, row, part): part of the row's tokens → the means of its values, or a part of them."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    part = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(lengths + row)
    span = tl.maximum(tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK, LEAST)
    active = tl.maximum(tl.cdiv(length, span), 1)
    pages = table + row * table_row
    last = tl.load(pages + tl.maximum(length, 0) // PAGE).to(tl.int64)
    # What is read so far was there before the layers began.
    if PDL:
        tl.extra.cuda.gdc_wait()
    if part >= active:
        return
    d = tl.arange(0, SIZE)
    g = tl.arange(0, QUERIES)
    mine = (g < GROUP)[:, None]
    place = (row * HEADS + head) * GROUP
    to = out + ((place + g) * SIZE)[:, None] + d[None, :]
    if (length < 0) | (last < 0):
        # A row that pads the batch.
        if FILL:
            tl.store(to, tl.zeros([QUERIES, SIZE], out.dtype.element_ty), mask=mine)
        return
    keys += head * key_head
    values += head * value_head
    new_key = tl.load(key + (row * HEADS + head) * SIZE + d)
    new_value = tl.load(value + (row * HEADS + head) * SIZE + d)
    if part == 0:
        tl.store(keys + last * key_block + length % PAGE * key_token + d, new_key)
        tl.store(values + last * value_block + length % PAGE * value_token + d, new_value)

    q = tl.load(query + ((place + g) * SIZE)[:, None] + d[None, :], mask=mine, other=0.0)
    # Powers of two: exp(x) = 2^(x / log 2).
    factor = scale * 1.4426950408889634
    # The first part begins with the new token, the others with none.
    own = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * factor
    there = tl.where(part == 0, 1.0, 0.0)
    highest = tl.where(part == 0, own, -1e30)
    total = tl.zeros([QUERIES], tl.float32) + there
    mean = tl.zeros([QUERIES, SIZE], tl.float32) + there * new_value.to(tl.float32)[None, :]
    end = tl.minimum((part + 1) * span, length)
    for start in tl.range(part * span, end, BLOCK, num_stages=STAGES):
        # A tile lies within a page.
        page = tl.load(pages + start // PAGE).to(tl.int64)
        t = tl.arange(0, BLOCK)
        real = start + t < end
        at = start % PAGE + t
        k = tl.load(keys + page * key_block + (at * key_token)[:, None] + d[None, :], mask=real[:, None], other=0.0)
        v = tl.load(
            values + page * value_block + (at * value_token)[:, None] + d[None, :], mask=real[:, None], other=0.0
        )
        scores = product(q, tl.trans(k), tl.zeros([QUERIES, BLOCK], tl.float32), EXACT) * factor
        scores = tl.where(real[None, :], scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weights, axis=1)
        mean = product(weights.to(v.dtype), v, mean * kept[:, None], EXACT)
        highest = higher

    if active == 1:
        tl.store(to, (mean / total[:, None]).to(out.dtype.element_ty), mask=mine)
        return
    # Parts lie side by side: (row, head, query, part).
    at = (place + g) * PARTS + part
    tl.store(parts + (at * SIZE)[:, None] + d[None, :], mean, mask=mine)
    tl.store(sums + at * 2, highest, mask=g < GROUP)
    tl.store(sums + at * 2 + 1, total, mask=g < GROUP)
    # All threads' parts are written before the ticket is drawn; who draws the last one sees all parts.
    tl.debug_barrier()
    if tl.atomic_add(tickets + row * HEADS + head, 1, sem="acq_rel") < active - 1:
        return
    tl.store(tickets + row * HEADS + head, 0)
    # One after the other, all queries at once: so nothing has to be summed over threads.
    highest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, SIZE], tl.float32)
    for one in tl.range(active):
        at = (place + g) * PARTS + one
        # Past the first-level cache, which may hold what was there before.
        top = tl.load(sums + at * 2, mask=g < GROUP, other=-1e30, cache_modifier=".cg")
        theirs = tl.load(sums + at * 2 + 1, mask=g < GROUP, other=0.0, cache_modifier=".cg")
        means = tl.load(parts + (at * SIZE)[:, None] + d[None, :], mask=mine, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, top)
        kept = tl.exp2(highest - higher)
        share = tl.exp2(top - higher)
        total = total * kept + theirs * share
        mean = mean * kept[:, None] + means * share[:, None]
        highest = higher
    tl.store(to, (mean / total[:, None]).to(out.dtype.element_ty), mask=mine)


def can_attend(query: Tensor, key: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` takes these, and its device is one where it is fast.

    Args:
        query: (n, heads, head size).
        key: (n, key-value heads, head size).
        keys: (blocks, tokens of a block, key-value heads, head size).
        values: as `keys`.
    """
    if not query.is_cuda or query.dtype.itemsize != 2:
        return False
    tile = tiles(query.device).paged
    return (
        tile is not None
        and keys.dtype == values.dtype == query.dtype
        and query.shape[-1] in _SIZES
        and query.shape[1] <= _QUERIES * key.shape[1]
        and keys.shape[1] % tile.block == 0
        and keys.stride(3) == values.stride(3) == 1
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, table: Tensor,
    tickets: Tensor, scale: float, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Appends a token to each row's cache, and attends to all of it: softmax(scale · q Kᵀ) V.

    Args:
        query: (n, heads, head size) bf16 or fp16, contiguous, as `key` and `value`; as many heads to each of the keys'.
        key: (n, key-value heads, head size), the new token's.
        value: as `key`.
        keys: (blocks, tokens of a block, key-value heads, head size), the last contiguous; written in place.
        values: as `keys`.
        lengths: (n,) int32, tokens that each row has so far; below 0 for a row that pads the batch.
        table: (n, most blocks of a row) int32, which blocks they are in, with the one where the new token goes; below 0
            where a row has none.
        tickets: (n · key-value heads,) int32, zeros, and zeros again afterwards.
        scale: multiplies the products of queries and keys.
        out: as `query`; written in place, but for rows that pad.

    Returns:
        (n, heads, head size), contiguous: `out`, or if it is None a new tensor, with zeros for rows that pad.
    """
    tile = tiles(query.device).for_paged(query.shape[0] * key.shape[1])
    assert tile is not None, "asked of `can_attend`"
    return attend_by(tile, query, key, value, keys, values, lengths, table, tickets, scale, out)


def attend_by(
    tile: Paged, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
    table: Tensor, tickets: Tensor, scale: float, out: Tensor | None = None, *, least: int = _LEAST,
) -> Tensor:  # fmt: skip
    """`attend` by the given tile, in parts of `least` tokens at least."""
    rows, queries, size = query.shape
    heads, page = key.shape[1], keys.shape[1]
    group = queries // heads
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    assert queries == heads * group and group <= _QUERIES and page % tile.block == least % tile.block == 0
    assert query.numel() * _PARTS < 2**31, "the kernel counts elements in 32 bits"
    count = parts_of(rows * heads)
    fills = out is None
    out = torch.empty_like(query) if out is None else out
    assert out.is_contiguous() and out.shape == query.shape and out.dtype == query.dtype
    parts = query.new_empty((rows, queries, count, size), dtype=torch.float32)
    sums = parts.new_empty((rows, queries, count, 2))
    launch(
        attend_kernel, (heads, rows, count),
        query, key, value, keys, values, lengths, table, tickets, out, parts, sums,
        scale, table.stride(0), *keys.stride()[:3], *values.stride()[:3],
        HEADS=heads, GROUP=group, SIZE=size, PAGE=page, PARTS=count, LEAST=least,
        QUERIES=_QUERIES, BLOCK=tile.block, STAGES=tile.stages,
        EXACT=takes_as_is(query.dtype), FILL=fills,
        device=query.device, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def parts_of(programs: int) -> int:
    """Into how many parts a row is cut at most, where there are so many programs without; a power of two."""
    return max(1, min(_PARTS, 1 << (max(_PROGRAMS // programs, 1).bit_length() - 1)))
