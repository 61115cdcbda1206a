"""A token for each row of logits, by its own temperature, top-k, top-p and draw, without sorting the vocabulary.

What a row's tokens weigh, exp((logit - the largest) / temperature), is counted in whole numbers: so sums are exact
whatever their order, and what is drawn depends on nothing else in the batch. Where a part of the vocabulary is cut off,
the edges are found by counting: tokens by the bits of their scaled logits, which are in the order of what they
represent, 11 of them, then 10, then 10.

Two numbers, a row of V tokens (in brackets: 64 rows of 128,256):

    bytes       8·V, read twice from memory or the second-level cache     [66 MB]
    operations  about 100·V                                                [0.8 GFLOP]

The first two kernels share a row out among programs. The last is a program a row, which leaves out all parts of it
whose largest logit is too small to matter: where few tokens are likely, most of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch

_CHUNK = 2048  # Tokens of a part.
_FIRST, _NEXT = tl.constexpr(2048), tl.constexpr(1024)  # Bins, of the first 11 bits and of 10 more.
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _key(logit):
    """Whole numbers in the order of the logits; NaN is the largest, as for torch's argmax."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # of -0.0, those of 0.0
    return tl.where(logit != logit, _LAST, tl.where(bits < 0, bits ^ _LAST, bits))


@triton.jit
def _logit(key):
    """The logit of a key."""
    return tl.where(key < 0, key ^ _LAST, key).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(logit, top, temperature):
    """At most 0."""
    return tl.div_rn(logit - top, temperature)


@triton.jit
def _rarity(scaled):
    """Whole numbers of 31 bits, the larger the less likely."""
    bits = (0.0 - scaled).to(tl.int32, bitcast=True)
    return tl.where((bits < 0) | (scaled != scaled), _LAST, bits)


@triton.jit
def _weight(scaled, unit):
    """What a token weighs; the most likely one weighs `unit`."""
    return tl.where(scaled == scaled, tl.exp(scaled) * unit, 0.0).to(tl.int64)


@triton.jit
def _row_top(tops, row, chunks, CHUNKS: tl.constexpr):
    """The key of the row's largest logit."""
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=-_LAST - 1), axis=0)


@triton.jit
def tops_kernel(logits, tops, places, size, row_stride, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """Program (row, chunk): the largest logit of the chunk, and which is the first to have it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    real = token < size
    key = tl.where(real, _key(tl.load(logits + row * row_stride + token, mask=real, other=0.0)), -_LAST - 1)
    top = tl.max(key, axis=0)
    at = row * tl.num_programs(1) + chunk
    tl.store(tops + at, top)
    tl.store(places + at, tl.min(tl.where(real & (key == top), token, size), axis=0))


@triton.jit
def weights_kernel(
    logits, tops, temperatures, top_ks, top_ps, sums, masses, counts, size, row_stride, unit,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): what its tokens weigh, together, and by the first bits of how unlikely they are."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    if temperature == 0:
        return
    top = _logit(_row_top(tops, row, chunks, CHUNKS))
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    real = token < size
    scaled = _scaled(tl.load(logits + row * row_stride + token, mask=real, other=0.0), top, temperature)
    weight = tl.where(real, _weight(scaled, unit), 0)
    tl.store(sums + row * chunks + chunk, tl.sum(weight, axis=0))
    if CUTS:
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        is_top_k = (top_k > 0) & (top_k < size)
        if is_top_k | (top_p < 1):
            # Most tokens cannot stay, and need not be counted: for top-p, those that are so unlikely that all of them
            # would not make up the rest; for top-k, those below the k-th of the chunks' largest.
            rarity = _rarity(scaled)
            rarest = _rarity(tl.log((1 - top_p) / size) - 0.01)
            if is_top_k:
                place = tl.arange(0, CHUNKS)
                keys = tl.load(tops + row * chunks + place, mask=place < chunks, other=-_LAST - 1)
                keys = tl.sort(keys, descending=True)
                kth = tl.sum(tl.where(place == top_k - 1, keys, 0), axis=0)
                rarest = tl.where(top_k <= chunks, _rarity(_scaled(_logit(kth), top, temperature)), _LAST)
            real = real & (rarity <= rarest)
            at = row * _FIRST + (rarity >> 20)
            tl.atomic_add(masses + at, weight, mask=real, sem="relaxed")
            if is_top_k:
                tl.atomic_add(counts + at, tl.full([CHUNK], 1, tl.int64), mask=real, sem="relaxed")


@triton.jit
def _bin(amounts, before, goal, BINS: tl.constexpr):
    """In which of some bins a sum reaches a goal, and what it is before that bin."""
    place = tl.arange(0, BINS)
    found = tl.minimum(tl.sum((before + tl.cumsum(amounts, axis=0) < goal).to(tl.int32), axis=0), BINS - 1)
    return found, before + tl.sum(tl.where(place < found, amounts, 0), axis=0)


@triton.jit
def _amounts(
    logits, tops, size, chunks, top, temperature, unit, scratch, first,
    SHIFT: tl.constexpr, WEIGHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """By the next 10 bits, how many tokens there are whose bits before are `first`, or what they weigh."""
    place = tl.arange(0, _NEXT)
    tl.debug_barrier()  # What was there was read by all.
    tl.store(scratch + place, tl.zeros([_NEXT], tl.int64))
    tl.debug_barrier()
    for chunk in tl.range(chunks):
        likeliest = _rarity(_scaled(_logit(tl.load(tops + chunk)), top, temperature))
        if (likeliest >> (SHIFT + 10)) <= first:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            real = token < size
            scaled = _scaled(tl.load(logits + token, mask=real, other=0.0), top, temperature)
            rarity = _rarity(scaled)
            amount = _weight(scaled, unit) if WEIGHS else tl.full([CHUNK], 1, tl.int64)
            real = real & ((rarity >> (SHIFT + 10)) == first)
            tl.atomic_add(scratch + ((rarity >> SHIFT) & (_NEXT - 1)), amount, mask=real, sem="relaxed")
    tl.debug_barrier()
    # Past the first-level cache, which may hold what was there before.
    return tl.load(scratch + place, cache_modifier=".cg")


@triton.jit
def _search(
    goal, amounts, logits, tops, size, chunks, top, temperature, unit, scratch,
    WEIGHS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """At which rarity the sum over tokens, the most likely ones first, reaches a goal, and the sum before."""
    first, before = _bin(tl.load(amounts + tl.arange(0, _FIRST)), tl.full([], 0, tl.int64), goal, _FIRST)
    more = _amounts(logits, tops, size, chunks, top, temperature, unit, scratch, first, 10, WEIGHS, CHUNK)
    second, before = _bin(more, before, goal, _NEXT)
    first = (first << 10) | second
    more = _amounts(logits, tops, size, chunks, top, temperature, unit, scratch, first, 0, WEIGHS, CHUNK)
    third, before = _bin(more, before, goal, _NEXT)
    return (first << 10) | third, before


@triton.jit
def _weight_of(rarity, unit):
    """What each token of this rarity weighs; nothing is divided by 0."""
    return tl.maximum(_weight(0.0 - rarity.to(tl.float32, bitcast=True), unit), 1)


@triton.jit
def _mass(logits, tops, size, chunks, top, temperature, unit, rarest, CHUNK: tl.constexpr):
    """What all tokens weigh that are no rarer."""
    mass = tl.zeros([CHUNK], tl.int64)
    for chunk in tl.range(chunks):
        if _rarity(_scaled(_logit(tl.load(tops + chunk)), top, temperature)) <= rarest:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            real = token < size
            scaled = _scaled(tl.load(logits + token, mask=real, other=0.0), top, temperature)
            mass += tl.where(real & (_rarity(scaled) <= rarest), _weight(scaled, unit), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _nth(logits, tops, size, chunks, top, temperature, rarity, n, CHUNK: tl.constexpr):
    """The n-th token of a rarity, counted from 0."""
    found = tl.full([], 0, tl.int32) + size
    seen = tl.full([], 0, tl.int64)
    for chunk in tl.range(chunks):
        if _rarity(_scaled(_logit(tl.load(tops + chunk)), top, temperature)) <= rarity:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            real = token < size
            scaled = _scaled(tl.load(logits + token, mask=real, other=0.0), top, temperature)
            alike = real & (_rarity(scaled) == rarity)
            rank = seen + tl.cumsum(alike.to(tl.int64), axis=0)
            found = tl.minimum(found, tl.min(tl.where(alike & (rank == n + 1), token, size), axis=0))
            seen += tl.sum(alike.to(tl.int64), axis=0)
    return found


@triton.jit
def choose_kernel(
    logits, tops, places, temperatures, top_ks, top_ps, draws, rests, sums, masses, counts, scratch, tokens,
    size, chunks, row_stride, unit,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: its token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    tops += row * chunks
    temperature = tl.load(temperatures + row)
    place = tl.arange(0, CHUNKS)
    here = place < chunks
    keys = tl.load(tops + place, mask=here, other=-_LAST - 1)
    key = tl.max(keys, axis=0)
    if temperature == 0:
        firsts = tl.load(places + row * chunks + place, mask=here & (keys == key), other=size)
        tl.store(tokens + row, tl.min(firsts, axis=0).to(tl.int64))
        return
    top = _logit(key)
    draw = tl.load(draws + row).to(tl.float64) + tl.load(rests + row).to(tl.float64)
    weights = tl.load(sums + row * chunks + place, mask=here, other=0)
    mass = tl.sum(weights, axis=0)
    is_cut = False
    if CUTS:
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        is_top_k = (top_k > 0) & (top_k < size)
        is_cut = is_top_k | (top_p < 1)
        if is_cut:
            masses += row * _FIRST
            scratch += row * _NEXT
            if is_top_k:
                rarest, _ = _search(
                    top_k.to(tl.int64), counts + row * _FIRST, logits, tops, size, chunks, top, temperature, unit,
                    scratch, False, CHUNK,
                )  # fmt: skip
                mass = _mass(logits, tops, size, chunks, top, temperature, unit, rarest, CHUNK)
            if top_p < 1:
                share = top_p.to(tl.float64) * mass.to(tl.float64)
                goal = tl.maximum(tl.ceil(share).to(tl.int64), 1)
                rarest, before = _search(
                    goal, masses, logits, tops, size, chunks, top, temperature, unit, scratch, True, CHUNK
                )
                # Of equals no more than reach it.
                weight = _weight_of(rarest, unit)
                mass = before + (goal - before + weight - 1) // weight * weight
            # In the order of probability, the least likely first.
            left = mass - 1 - tl.minimum((draw * mass.to(tl.float64)).to(tl.int64), mass - 1)
            rarity, before = _search(
                left + 1, masses, logits, tops, size, chunks, top, temperature, unit, scratch, True, CHUNK
            )
            n = (left - before) // _weight_of(rarity, unit)
            token = _nth(logits, tops, size, chunks, top, temperature, rarity, n, CHUNK)
            tl.store(tokens + row, tl.minimum(token, size - 1).to(tl.int64))
    if not is_cut:
        # In the order of the vocabulary.
        goal = tl.minimum((draw * mass.to(tl.float64)).to(tl.int64), mass - 1)
        chunk = tl.sum((here & (tl.cumsum(weights, axis=0) <= goal)).to(tl.int32), axis=0)
        before = tl.sum(tl.where(place < chunk, weights, 0), axis=0)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        real = token < size
        scaled = _scaled(tl.load(logits + token, mask=real, other=0.0), top, temperature)
        weight = tl.where(real, _weight(scaled, unit), 0)
        after = tl.sum((before + tl.cumsum(weight, axis=0) <= goal).to(tl.int32), axis=0)
        tl.store(tokens + row, tl.minimum(chunk * CHUNK + after, size - 1).to(tl.int64))


def sample(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, draws: Tensor, rests: Tensor, *,
    cuts: bool = True,
) -> Tensor:  # fmt: skip
    """A token for each row.

    A row that is cut (0 < top-k < V, or top-p < 1) is drawn in the order of probability, the least likely token first;
    any other in the order of the vocabulary. Top-k keeps all tokens as likely as the k-th, top-p the fewest that reach
    it, of equals those with the smaller ids. A row with NaN or +inf, or nothing but -inf, gets some token.

    Args:
        logits: (n, V) fp32, rows of which are contiguous; V up to 2^24.
        temperatures: (n,) fp32, not below 0; 0: the most likely token, the first of several.
        top_ks: (n,) int32; 0: all.
        top_ps: (n,) fp32; 1: all.
        draws: (n,) fp32, which with `rests` is a number in [0, 1), uniform.
        rests: (n,) fp32, what is lost of the draws in 32 bits.
        cuts: whether some row is cut.

    Returns:
        (n,) int64.
    """
    rows, size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and 0 < size <= 1 << 24
    assert all(one.is_contiguous() for one in (temperatures, top_ks, top_ps, draws, rests))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    chunks = triton.cdiv(size, _CHUNK)
    # Each of its own, so that addresses are aligned alike for any number of rows: else kernels are compiled twice.
    tops, places = (torch.empty((rows, chunks), dtype=torch.int32, device=logits.device) for _ in range(2))
    sums = tops.new_empty((rows, chunks), dtype=torch.int64)
    bins = (rows, _FIRST.value) if cuts else (0,)
    masses, counts = tops.new_zeros((2, *bins), dtype=torch.int64)
    scratch = tops.new_empty((rows, _NEXT.value) if cuts else (0,), dtype=torch.int64)
    # As large as sums over the vocabulary allow.
    unit = 2.0 ** (62 - (size - 1).bit_length())
    spread = {"CHUNK": _CHUNK, "CHUNKS": triton.next_power_of_2(chunks), "CUTS": cuts}
    stride, device = logits.stride(0), logits.device
    launch(tops_kernel, (rows, chunks), logits, tops, places, size, stride, CHUNK=_CHUNK, device=device)
    launch(
        weights_kernel, (rows, chunks),
        logits, tops, temperatures, top_ks, top_ps, sums, masses, counts, size, stride, unit, device=device, **spread,
    )  # fmt: skip
    launch(
        choose_kernel, (rows,),
        logits, tops, places, temperatures, top_ks, top_ps, draws, rests, sums, masses, counts, scratch, tokens,
        size, chunks, stride, unit, num_warps=8, device=device, **spread,
    )  # fmt: skip
    return tokens
