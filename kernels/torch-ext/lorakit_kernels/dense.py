"""The base's own products of siblings for few tokens: q, k and v, or gate and up, in one launch.

Apart, each product begins and ends on its own: memory rests between them, and a module's channels seldom fill all
multiprocessors evenly. Together they are one longer read. Outputs stay tensors of their own, so weights stay where they
are.

Two numbers, for siblings of N channels in all, T tokens and weights of two bytes (in brackets: Llama-2-7B's gate and
up, 32 tokens):

    bytes       2·N·in for the weights     [180 MB]
    operations  2·T·N·in                   [5.8 GFLOP]

Memory is the limit. The weights are the matrix units' first operand, which takes 64 channels at a time, and the tokens
the second, which takes as few as 16: so little is computed for nothing. All tokens are in one tile, and the weights are
read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .arguments import FIRSTS, launch, padded, takes_as_is
from .prefill import product
from .siblings import column_of, select
from .tuning import Dense

_FEWEST = 16  # Tokens of a tile.


@triton.jit(do_not_specialize=["tokens", *FIRSTS])
def products_kernel(
    x, y0, y1, y2, y3, w0, w1, w2, w3, b0, b1, b2, b3, tokens, in_features, out0, out1, out2, out3,
    first1, first2, first3,
    SIBLINGS: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile): y ← W x (+ bias), for BLOCK_N channels of a sibling and all tokens."""
    tile = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # A sibling's weights take the place of its column, which is for tables.
    sibling, block, y, w, out = select(
        tile, y0, y1, y2, y3, w0, w1, w2, w3, out0, out1, out2, out3, first1, first2, first3, SIBLINGS
    )
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    # Channels past the end read the first one's weights, without a mask, and are not stored.
    at_w = w + (tl.where(n < out, n, 0)[:, None] * in_features + k[None, :])
    at_x = x + (m[:, None] * in_features + k[None, :])
    there = (m < tokens)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for _ in tl.range(0, in_features, BLOCK_K, num_stages=STAGES):
        weights = tl.load(at_w)
        values = tl.load(at_x, mask=there, other=0.0)
        sums = product(weights, tl.trans(values), sums, EXACT)
        at_w += BLOCK_K
        at_x += BLOCK_K
    if BIAS:
        bias = column_of(sibling, b0, b1, b2, b3, SIBLINGS)
        sums += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[:, None]
    place = y + (m[:, None] * out + n[None, :])
    tl.store(place, tl.trans(sums).to(y.dtype.element_ty), mask=there & (n < out)[None, :])


def fits(x: Tensor, tile: Dense) -> bool:
    """Whether the kernel takes these: few tokens, 16 bits, and a width of whole tiles."""
    return x.numel() // x.shape[-1] <= tile.tokens and x.dtype.itemsize == 2 and x.shape[-1] % tile.block_k == 0


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], ys: Sequence[Tensor], tile: Dense) -> None:
    """Launches the products: arguments as in `linear.linears`, outputs into ys."""
    tokens, in_features = x.shape
    outs = [y.shape[-1] for y in ys]
    assert fits(x, tile)
    assert max(outs) * max(tokens, in_features) < 2**31, "the kernel counts elements in 32 bits"
    firsts = [sum(triton.cdiv(out, tile.block_n) for out in outs[:i]) for i in range(len(outs) + 1)]
    launch(
        products_kernel, (firsts[-1],),
        x, *padded(ys), *padded(weights), *padded(biases or weights), tokens, in_features, *padded(outs),
        *padded(firsts[:-1])[1:],
        SIBLINGS=len(ys), BIAS=bool(biases), BLOCK_M=max(_FEWEST, triton.next_power_of_2(tokens)),
        BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, EXACT=takes_as_is(x.dtype),
        device=x.device, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
