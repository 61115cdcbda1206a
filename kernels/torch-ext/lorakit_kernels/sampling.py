"""A token for each row of logits, by its own temperature, top-k, top-p and draw, without sorting the vocabulary.

What a row's tokens weigh is counted in whole numbers (`rarity.py`): so sums are exact whatever their order, and what is
drawn depends on nothing else in the batch. Where a part of the vocabulary is cut off, the tokens that may stay are
counted by the first bits of their rarity; few are listed and sorted (`listing.py`), among many the edges are found by
more bits (`counting.py`).

Two numbers, a row of V tokens (in brackets: 64 rows of 128,256):

    bytes       8·V, read twice from memory or the second-level cache     [66 MB]
    operations  about 100·V                                                [0.8 GFLOP]

Rows are shared out among programs where all of them is read. The last kernel is a program a row, which reads the parts
of it again whose largest logit may matter: where few tokens are likely, few of them, once; where many are, all of them,
up to nine times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch
from .counting import FIRST, NEXT, counted, find_bin
from .listing import drawn_of, listed
from .rarity import LAST, key_of, logit_of, rarity_of, scaled_by, share_of, weight_of

_CHUNK = 2048  # Tokens of a program that reads a part of a row; 16 or more.
_TOGETHER = 2  # Chunks that a program reads at a time which has a row to itself.
_LISTED = 1024  # Tokens that are sorted at most.
_WARPS = 16  # Of a program that has a row to itself.
_PARTS = tl.constexpr(16)  # Of a chunk, the largest logit of each of which is noted, too.
_SETTINGS = ["temperatures", "top_ks", "top_ps", "draws", "rests"]  # Of rows: their addresses are aligned in any way.


@triton.jit
def _row_top(tops, row, chunks, CHUNKS: tl.constexpr):
    """The key of the row's largest logit."""
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=-LAST - 1), axis=0)


@triton.jit
def tops_kernel(
    logits, tops, places, parts, size, row_stride,
    CHUNK: tl.constexpr, CUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): the largest logit of the chunk, which is the first to have it, and those of its parts."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, _PARTS)
    token = chunk * CHUNK + part[:, None] * (CHUNK // _PARTS) + tl.arange(0, CHUNK // _PARTS)[None, :]
    real = token < size
    key = tl.where(real, key_of(tl.load(logits + row * row_stride + token, mask=real, other=0.0)), -LAST - 1)
    tops_of_parts = tl.max(key, axis=1)
    top = tl.max(tops_of_parts, axis=0)
    at = row * tl.num_programs(1) + chunk
    tl.store(tops + at, top)
    firsts = tl.min(tl.where(real & (key == top), token, size), axis=1)
    tl.store(places + at, tl.min(firsts, axis=0))
    if CUTS:
        tl.store(parts + at * _PARTS + part, tops_of_parts)


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def floors_kernel(
    tops, parts, temperatures, top_ks, top_ps, floors, size, chunks, unit,
    CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: which tokens cannot stay, and need not be counted, by top-k and by both."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature == 0:
        return
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    top = logit_of(_row_top(tops, row, chunks, CHUNKS))
    rarest = rarity_of(-tl.log(unit) - 0.01)  # What weighs nothing is never drawn.
    if (top_k > 0) & (top_k <= chunks * _PARTS):
        # Those below the k-th of the parts' largest, which is found bit by bit.
        part = tl.arange(0, CHUNKS * _PARTS)
        real = part < chunks * _PARTS
        key = tl.load(parts + row * chunks * _PARTS + part, mask=real, other=-LAST - 1)
        rarity = tl.where(real, rarity_of(scaled_by(logit_of(key), top, temperature)), LAST)
        kth = tl.full([], 0, tl.int32)
        for place in tl.range(31):
            bit = tl.full([], 1, tl.int32) << (30 - place)
            few = tl.sum((rarity < (kth | bit)).to(tl.int32), axis=0) < top_k
            kth = tl.where(few, kth | bit, kth)
        rarest = tl.minimum(rarest, kth)
    tl.store(floors + 2 * row, rarest)
    # Those that are so unlikely that all of them would not make up the rest.
    spared = rarity_of(tl.log(tl.maximum(1 - top_p, 1e-9) / size) - 0.01)
    tl.store(floors + 2 * row + 1, tl.where(top_p < 1, tl.minimum(rarest, spared), rarest))


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def weights_kernel(
    logits, tops, temperatures, top_ks, top_ps, floors, sums, masses, counts, size, row_stride, unit,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): what its tokens weigh, together, and by the first bits of their rarity."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    real = token < size
    logit = tl.load(logits + row * row_stride + token, mask=real, other=0.0)  # Asked for before anything is waited for.
    if temperature == 0:
        return
    top = logit_of(_row_top(tops, row, chunks, CHUNKS))
    scaled = scaled_by(logit, top, temperature)
    weight = tl.where(real, weight_of(scaled, unit), 0)
    tl.store(sums + row * chunks + chunk, tl.sum(weight, axis=0))
    if CUTS:
        top_k = tl.load(top_ks + row)
        is_top_k = (top_k > 0) & (top_k < size)
        if is_top_k | (tl.load(top_ps + row) < 1):
            rarity = rarity_of(scaled)
            at = row * FIRST + (rarity >> 20)
            stays = real & (rarity <= tl.load(floors + 2 * row + 1))
            tl.atomic_add(masses + at, weight, mask=stays, sem="relaxed")
            if is_top_k:
                stays = real & (rarity <= tl.load(floors + 2 * row))
                tl.atomic_add(counts + at, tl.full([CHUNK], 1, tl.int64), mask=stays, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=_SETTINGS)
def choose_kernel(
    logits, tops, places, temperatures, top_ks, top_ps, draws, rests, floors, sums, masses, counts, scratch, tokens,
    size, chunks, row_stride, unit,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, TOGETHER: tl.constexpr, LISTED: tl.constexpr,
    SCRATCH: tl.constexpr, CUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program row: its token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.load(temperatures + row)
    place = tl.arange(0, CHUNKS)
    here = place < chunks
    keys = tl.load(tops + row * chunks + place, mask=here, other=-LAST - 1)
    key = tl.max(keys, axis=0)
    if temperature == 0:
        firsts = tl.load(places + row * chunks + place, mask=here & (keys == key), other=size)
        tl.store(tokens + row, tl.min(firsts, axis=0).to(tl.int64))
        return
    top = logit_of(key)
    draw = tl.load(draws + row).to(tl.float64) + tl.load(rests + row).to(tl.float64)
    weights = tl.load(sums + row * chunks + place, mask=here, other=0)
    mass = tl.sum(weights, axis=0)
    is_cut = False
    if CUTS:
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        is_top_k = (top_k > 0) & (top_k < size)
        is_cut = is_top_k | (top_p < 1)
        if is_cut:
            masses += row * FIRST
            counts += row * FIRST
            scratch += row * SCRATCH
            likeliest = tl.where(here, rarity_of(scaled_by(logit_of(keys), top, temperature)), LAST)
            # What top-k leaves has to be known before the share of it that top-p leaves.
            amounts = tl.load((counts if is_top_k else masses) + tl.arange(0, FIRST))
            goal = top_k.to(tl.int64) if is_top_k else share_of(mass, top_p)
            limit, _ = find_bin(amounts, tl.full([], 0, tl.int64), goal, FIRST)
            floor = tl.load(floors + 2 * row + (0 if is_top_k else 1))
            rarest = tl.minimum(floor, (limit << 20) | 0xFFFFF)
            count = listed(logits, likeliest, rarest, size, top, temperature, scratch, LISTED, CHUNK, CHUNKS, TOGETHER)
            if count <= LISTED:
                token = drawn_of(scratch, count, mass, top_k, top_p, draw, size, unit, LISTED)
            else:
                token = counted(
                    logits, likeliest, counts, masses, mass, top_k, top_p, draw, size, top, temperature, unit, scratch,
                    CHUNK, CHUNKS, TOGETHER,
                )  # fmt: skip
            tl.store(tokens + row, tl.minimum(token, size - 1).to(tl.int64))
    if not is_cut:
        # In the order of the vocabulary.
        goal = tl.minimum((draw * mass.to(tl.float64)).to(tl.int64), mass - 1)
        chunk = tl.sum((here & (tl.cumsum(weights, axis=0) <= goal)).to(tl.int32), axis=0)
        before = tl.sum(tl.where(place < chunk, weights, 0), axis=0)
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        real = token < size
        scaled = scaled_by(tl.load(logits + token, mask=real, other=0.0), top, temperature)
        weight = tl.where(real, weight_of(scaled, unit), 0)
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
        logits: (n, V) fp32, rows of which are contiguous; V up to 2^20.
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
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and 0 < size <= 1 << 20
    assert all(one.is_contiguous() for one in (temperatures, top_ks, top_ps, draws, rests))
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    chunks = triton.cdiv(size, _CHUNK)
    # Each of its own, so that addresses are aligned alike for any number of rows: else kernels are compiled twice.
    tops, places = (torch.empty((rows, chunks), dtype=torch.int32, device=logits.device) for _ in range(2))
    sums = tops.new_empty((rows, chunks), dtype=torch.int64)
    cut = rows if cuts else 0
    parts, floors = tops.new_empty((cut, chunks, _PARTS.value)), tops.new_empty((cut, 2))
    masses, counts = tops.new_zeros((2, cut, FIRST.value), dtype=torch.int64)
    scratch = tops.new_empty((cut, max(NEXT.value, _LISTED)), dtype=torch.int64)
    # As large as sums over the vocabulary allow.
    unit = 2.0 ** (62 - (size - 1).bit_length())
    stride, device = logits.stride(0), logits.device
    spread = {"CHUNK": _CHUNK, "CHUNKS": triton.next_power_of_2(chunks), "CUTS": cuts}
    launch(
        tops_kernel, (rows, chunks),
        logits, tops, places, parts, size, stride, CHUNK=_CHUNK, CUTS=cuts, device=device,
    )  # fmt: skip
    if cuts:
        launch(
            floors_kernel, (rows,), tops, parts, temperatures, top_ks, top_ps, floors, size, chunks, unit,
            CHUNKS=spread["CHUNKS"], num_warps=8, device=device,
        )  # fmt: skip
    launch(
        weights_kernel, (rows, chunks),
        logits, tops, temperatures, top_ks, top_ps, floors, sums, masses, counts, size, stride, unit,
        device=device, **spread,
    )  # fmt: skip
    launch(
        choose_kernel, (rows,),
        logits, tops, places, temperatures, top_ks, top_ps, draws, rests, floors, sums, masses, counts, scratch, tokens,
        size, chunks, stride, unit, TOGETHER=_TOGETHER, LISTED=_LISTED, SCRATCH=scratch.shape[1], num_warps=_WARPS,
        device=device, **spread,
    )  # fmt: skip
    return tokens
