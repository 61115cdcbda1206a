"""Where sums over a row's tokens reach a goal, the most likely tokens first, found by counting. For kernels.

Tokens are counted, or weighed, by the bits of their rarity: 11 of them, then 10, then 10. One program finds one row's
edge; it reads the row in tiles, and leaves out those whose largest logit is too small to matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rarity import left_of, rarity_of, scaled_by, share_of, weight_at, weight_of

FIRST = tl.constexpr(2048)
"""Bins of the first 11 bits."""
NEXT = tl.constexpr(1024)
"""Bins of 10 more."""


@triton.jit
def find_bin(amounts, before, goal, BINS: tl.constexpr):
    """In which of some bins a sum reaches a goal, and what it is before that bin."""
    place = tl.arange(0, BINS)
    found = tl.minimum(tl.sum((before + tl.cumsum(amounts, axis=0) < goal).to(tl.int32), axis=0), BINS - 1)
    return found, before + tl.sum(tl.where(place < found, amounts, 0), axis=0)


@triton.jit
def next_tile(likeliest, tile, rarest, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr):
    """The first tile behind one that has a token no rarer than that, as its chunks' most likely ones tell."""
    of_chunk = tl.arange(0, CHUNKS) // TOGETHER
    return tl.min(tl.where((of_chunk > tile) & (likeliest <= rarest), of_chunk, CHUNKS), axis=0)


@triton.jit
def read_tile(logits, tile, size, top, temperature, TILE: tl.constexpr):
    """A tile's tokens, which of them there are, and their scaled logits."""
    token = tile * TILE + tl.arange(0, TILE)
    real = token < size
    return token, real, scaled_by(tl.load(logits + token, mask=real, other=0.0), top, temperature)


@triton.jit
def _amounts(
    logits, likeliest, size, top, temperature, unit, scratch, first,
    SHIFT: tl.constexpr, WEIGHS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """By the next 10 bits, how many tokens there are whose bits before are `first`, or what they weigh."""
    tiles = tl.cdiv(size, TOGETHER * CHUNK)
    rarest = (first << (SHIFT + 10)) | ((1 << (SHIFT + 10)) - 1)
    place = tl.arange(0, NEXT)
    tl.debug_barrier()  # What was there was read by all.
    tl.store(scratch + place, tl.zeros([NEXT], tl.int64))
    tl.debug_barrier()
    tile = next_tile(likeliest, -1, rarest, CHUNKS, TOGETHER)
    while tile < tiles:
        _, real, scaled = read_tile(logits, tile, size, top, temperature, TOGETHER * CHUNK)
        rarity = rarity_of(scaled)
        amount = weight_of(scaled, unit) if WEIGHS else tl.full([TOGETHER * CHUNK], 1, tl.int64)
        real = real & ((rarity >> (SHIFT + 10)) == first)
        tl.atomic_add(scratch + ((rarity >> SHIFT) & (NEXT - 1)), amount, mask=real, sem="relaxed")
        tile = next_tile(likeliest, tile, rarest, CHUNKS, TOGETHER)
    tl.debug_barrier()
    # Past the first-level cache, which may hold what was there before.
    return tl.load(scratch + place, cache_modifier=".cg")


@triton.jit
def search(
    goal, amounts, logits, likeliest, size, top, temperature, unit, scratch,
    WEIGHS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """At which rarity the sum reaches a goal, and the sum before. `amounts` are those of the first bits."""
    first, before = find_bin(tl.load(amounts + tl.arange(0, FIRST)), tl.full([], 0, tl.int64), goal, FIRST)
    more = _amounts(
        logits, likeliest, size, top, temperature, unit, scratch, first, 10, WEIGHS, CHUNK, CHUNKS, TOGETHER
    )
    second, before = find_bin(more, before, goal, NEXT)
    first = (first << 10) | second
    more = _amounts(logits, likeliest, size, top, temperature, unit, scratch, first, 0, WEIGHS, CHUNK, CHUNKS, TOGETHER)
    third, before = find_bin(more, before, goal, NEXT)
    return (first << 10) | third, before


@triton.jit
def mass_to(
    logits, likeliest, size, top, temperature, unit, rarest,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """What all tokens weigh that are no rarer."""
    mass = tl.full([], 0, tl.int64)
    tiles = tl.cdiv(size, TOGETHER * CHUNK)
    tile = next_tile(likeliest, -1, rarest, CHUNKS, TOGETHER)
    while tile < tiles:
        _, real, scaled = read_tile(logits, tile, size, top, temperature, TOGETHER * CHUNK)
        mass += tl.sum(tl.where(real & (rarity_of(scaled) <= rarest), weight_of(scaled, unit), 0), axis=0)
        tile = next_tile(likeliest, tile, rarest, CHUNKS, TOGETHER)
    return mass


@triton.jit
def nth_of(
    logits, likeliest, size, top, temperature, rarity, n,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The n-th token of a rarity, counted from 0."""
    found = tl.full([], 0, tl.int32) + size
    seen = tl.full([], 0, tl.int64)
    tiles = tl.cdiv(size, TOGETHER * CHUNK)
    tile = next_tile(likeliest, -1, rarity, CHUNKS, TOGETHER)
    while (tile < tiles) & (seen <= n):
        token, real, scaled = read_tile(logits, tile, size, top, temperature, TOGETHER * CHUNK)
        alike = real & (rarity_of(scaled) == rarity)
        rank = seen + tl.cumsum(alike.to(tl.int64), axis=0)
        found = tl.minimum(found, tl.min(tl.where(alike & (rank == n + 1), token, size), axis=0))
        seen += tl.sum(alike.to(tl.int64), axis=0)
        tile = next_tile(likeliest, tile, rarity, CHUNKS, TOGETHER)
    return found


@triton.jit
def counted(
    logits, likeliest, counts, masses, mass, top_k, top_p, draw, size, top, temperature, unit, scratch,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A row's token, where top-k or top-p cut it: in the order of probability, the least likely first."""
    if (top_k > 0) & (top_k < size):
        rarest, _ = search(
            top_k.to(tl.int64), counts, logits, likeliest, size, top, temperature, unit, scratch,
            False, CHUNK, CHUNKS, TOGETHER,
        )  # fmt: skip
        mass = mass_to(logits, likeliest, size, top, temperature, unit, rarest, CHUNK, CHUNKS, TOGETHER)
    if top_p < 1:
        goal = share_of(mass, top_p)
        rarest, before = search(
            goal, masses, logits, likeliest, size, top, temperature, unit, scratch, True, CHUNK, CHUNKS, TOGETHER
        )
        # Of equals no more than reach it.
        weight = tl.maximum(weight_at(rarest, unit), 1)
        mass = before + (goal - before + weight - 1) // weight * weight
    left = left_of(mass, draw)
    rarity, before = search(
        left + 1, masses, logits, likeliest, size, top, temperature, unit, scratch, True, CHUNK, CHUNKS, TOGETHER
    )
    n = (left - before) // tl.maximum(weight_at(rarity, unit), 1)
    return nth_of(logits, likeliest, size, top, temperature, rarity, n, CHUNK, CHUNKS, TOGETHER)
