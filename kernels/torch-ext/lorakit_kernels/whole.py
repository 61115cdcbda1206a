"""Modules for which an adapter brings a whole weight w of its own: a classifier, an output layer, an embedding.

y ← s · w x + d takes the place of what the base's module gave, for rows of such adapters; all others keep their bits.
Matrix units, a tile of tokens of one segment at a time.

Two numbers, for a segment of T tokens at an output layer of V tokens and width D, w of two bytes (in brackets: one
token, Llama-3-8B):

    bytes       2·V·D for w, read once for each tile of tokens     [1.05 GB]
    operations  2·T·V·D                                            [1.05 GFLOP]

Memory is the limit until a tile is full; the base's own product costs the same, and was made for the other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import launch, takes_as_is, weight_type
from .entries import WORDS
from .plan import COLUMNS
from .prefill import product, tile_of

_FEW = 16
"""Tokens of a tile where segments have no more than these."""
_MANY = 64
_BLOCK_N = 64
_BLOCK_T = 32


@triton.jit(do_not_specialize=["segments", "tokens_per_row", "column"])
def linear_kernel(
    x, y, table, plan, segments, tokens_per_row, in_features, out, slot_stride, column,
    WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    POWER: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (block of channels, tile of tokens): y ← s · w x + d."""
    slot, token, inside = tile_of(tl.program_id(1), plan, segments, tokens_per_row, BLOCK_M, POWER, COLUMNS)
    entry = table + slot.to(tl.int64) * slot_stride + column * WORDS
    address = tl.load(entry + 6, mask=slot >= 0, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if address != 0:
        w = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)), 16)
        scale = tl.load(entry + 5).to(tl.int32).to(tl.float32, bitcast=True)
        d = tl.load(entry + 3)
        line = tl.arange(0, BLOCK_N)
        n = tl.program_id(0) * BLOCK_N + line
        k = tl.arange(0, BLOCK_K)
        # An output layer has more elements than 32 bits count; a block of its channels has fewer.
        block = w + tl.program_id(0).to(tl.int64) * BLOCK_N * in_features
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, in_features, BLOCK_K):
            columns = first + k
            values = tl.load(
                x + token[:, None] * in_features + columns[None, :],
                mask=inside[:, None] & (columns < in_features)[None, :], other=0.0,
            )  # fmt: skip
            weights = tl.load(
                block + ((line * in_features)[None, :] + columns[:, None]),
                mask=(n < out)[None, :] & (columns < in_features)[:, None], other=0.0,
            )  # fmt: skip
            sums = product(values, weights, sums, EXACT)
        sums = sums * scale
        if d != 0:
            sums += tl.load(d.to(tl.pointer_type(tl.float32)) + n, mask=n < out, other=0.0)[None, :]
        place = y + token[:, None] * out + n[None, :]
        tl.store(place, sums.to(y.dtype.element_ty), mask=inside[:, None] & (n < out)[None, :])


@triton.jit(do_not_specialize=["tokens", "tokens_per_row", "column"])
def embedding_kernel(
    ids, y, table, plan, tokens, tokens_per_row, out, slot_stride, column,
    WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, block of channels): each token's row of its own adapter's w."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(plan + (token // tokens_per_row) * COLUMNS, mask=token < tokens, other=-1)
    entry = table + slot.to(tl.int64) * slot_stride + column * WORDS
    address = tl.load(entry + 6, mask=slot >= 0, other=0)
    scale = tl.load(entry + 5, mask=slot >= 0, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    if PDL:
        tl.extra.cuda.gdc_wait()
    served = address != 0
    index = tl.load(ids + token, mask=served, other=0).to(tl.int64)
    w = address.to(tl.pointer_type(WEIGHT))
    there = served[:, None] & (n < out)[None, :]
    values = tl.load(w[:, None] + (index * out)[:, None] + n[None, :], mask=there, other=0.0).to(tl.float32)
    place = y + token.to(tl.int64)[:, None] * out + n[None, :]
    tl.store(place, (values * scale[:, None]).to(y.dtype.element_ty), mask=there)


def linear(
    x: Tensor, y: Tensor, table: Tensor, plan: Tensor, column: int, weight: torch.dtype, segments: int = 0
) -> None:
    """Launches the product: arguments as in `sgmv.replace_`."""
    tokens = x.shape[0]
    segments = segments or plan.shape[0]
    block = _FEW if tokens // segments <= _FEW else _MANY
    exact = x.dtype == weight and takes_as_is(weight)
    launch(
        linear_kernel, (triton.cdiv(y.shape[-1], _BLOCK_N), tokens // block + segments),
        x, y, table, plan, segments, tokens // plan.shape[0], x.shape[-1], y.shape[-1], table.stride(0), column,
        WEIGHT=weight_type(weight), BLOCK_M=block, BLOCK_N=_BLOCK_N, BLOCK_K=64 if exact else 32,
        POWER=triton.next_power_of_2(segments), WORDS=WORDS, COLUMNS=COLUMNS,
        EXACT=exact,
        device=x.device, num_warps=4 if block == _FEW else 8, num_stages=3,
    )  # fmt: skip


def embedding(ids: Tensor, y: Tensor, table: Tensor, plan: Tensor, column: int, weight: torch.dtype) -> None:
    """Launches the lookup: arguments as in `sgmv.replace_`."""
    tokens = ids.shape[0]
    launch(
        embedding_kernel, (triton.cdiv(tokens, _BLOCK_T), triton.cdiv(y.shape[-1], _BLOCK_N)),
        ids, y, table, plan, tokens, tokens // plan.shape[0], y.shape[-1], table.stride(0), column,
        WEIGHT=weight_type(weight), BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, WORDS=WORDS, COLUMNS=COLUMNS,
        device=ids.device, num_warps=4,
    )  # fmt: skip
