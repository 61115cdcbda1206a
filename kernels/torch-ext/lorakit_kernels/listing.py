"""A row's token where few may be drawn: these are listed and sorted. For kernels.

One program lists one row's, and reads each tile of the row once, if its largest logit may matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .counting import next_tile, read_tile
from .rarity import left_of, rarity_of, share_of, weight_at

_BITS, _IDS = tl.constexpr(24), tl.constexpr((1 << 24) - 1)
"""Of a token's id."""
_NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def listed(
    logits, likeliest, rarest, size, top, temperature, scratch,
    LISTED: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Lists the tokens that are no rarer, as long as the list has room.

    Returns:
        How many there are; more than `LISTED`, if there is no room for all.
    """
    count = tl.full([], 0, tl.int32)
    tiles = tl.cdiv(size, TOGETHER * CHUNK)
    tile = next_tile(likeliest, -1, rarest, CHUNKS, TOGETHER)
    while (tile < tiles) & (count <= LISTED):
        token, real, scaled = read_tile(logits, tile, size, top, temperature, TOGETHER * CHUNK)
        rarity = rarity_of(scaled)
        taken = real & (rarity <= rarest)
        place = count + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        entry = (rarity.to(tl.int64) << _BITS) | token
        tl.store(scratch + place, entry, mask=taken & (place < LISTED))
        count += tl.sum(taken.to(tl.int32), axis=0)
        tile = next_tile(likeliest, tile, rarest, CHUNKS, TOGETHER)
    tl.debug_barrier()
    return count


@triton.jit
def drawn_of(scratch, count, mass, top_k, top_p, draw, size, unit, LISTED: tl.constexpr):
    """One of the listed: in the order of probability, the least likely first."""
    place = tl.arange(0, LISTED)
    # Past the first-level cache, which may hold what was there before.
    entries = tl.sort(tl.load(scratch + place, mask=place < count, other=_NONE, cache_modifier=".cg"))
    rarity = (entries >> _BITS).to(tl.int32)
    weight = tl.where(place < count, weight_at(rarity, unit), 0)
    if (top_k > 0) & (top_k < size):
        rarest = tl.sum(tl.where(place == tl.minimum(top_k, count) - 1, rarity, 0), axis=0)
        mass = tl.sum(tl.where(rarity <= rarest, weight, 0), axis=0)
    sums = tl.cumsum(weight, axis=0)
    if top_p < 1:
        goal = share_of(mass, top_p)
        # With the token that reaches it; its equals that come before have smaller ids.
        mass = tl.sum(tl.where(sums - weight < goal, weight, 0), axis=0)
    left = left_of(mass, draw)
    chosen = tl.sum((sums <= left).to(tl.int32), axis=0)
    return tl.sum(tl.where(place == chosen, entries & _IDS, 0), axis=0).to(tl.int32)
