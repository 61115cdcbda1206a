"""How unlikely a token is, and what it weighs: of one row of logits, in whole numbers. For kernels.

A token's scaled logit is (logit - the row's largest) / temperature, at most 0. The bits of its negative, as a whole
number, are in the order of what they represent: the token's rarity, 31 bits. Its weight is exp(scaled) times a unit,
cut to a whole number, so that sums are exact whatever their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAST = tl.constexpr(0x7FFFFFFF)
"""The largest rarity: of NaN, and of what lies above the largest logit of a broken row."""


@triton.jit
def key_of(logit):
    """Whole numbers in the order of the logits; NaN is the largest, as for torch's argmax."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # of -0.0, those of 0.0
    return tl.where(logit != logit, LAST, tl.where(bits < 0, bits ^ LAST, bits))


@triton.jit
def logit_of(key):
    """The logit of a key."""
    return tl.where(key < 0, key ^ LAST, key).to(tl.float32, bitcast=True)


@triton.jit
def scaled_by(logit, top, temperature):
    """At most 0."""
    return tl.div_rn(logit - top, temperature)


@triton.jit
def rarity_of(scaled):
    """The larger, the less likely."""
    bits = (0.0 - scaled).to(tl.int32, bitcast=True)
    return tl.where((bits < 0) | (scaled != scaled), LAST, bits)


@triton.jit
def weight_of(scaled, unit):
    """What a token weighs; the most likely one weighs `unit`."""
    return tl.where(scaled == scaled, tl.exp(scaled) * unit, 0.0).to(tl.int64)


@triton.jit
def weight_at(rarity, unit):
    """What each token of this rarity weighs."""
    return weight_of(0.0 - rarity.to(tl.float32, bitcast=True), unit)


@triton.jit
def share_of(mass, top_p):
    """What the tokens must weigh that top-p leaves."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64), 1)


@triton.jit
def left_of(mass, draw):
    """What the tokens weigh that are more likely than the one that is drawn, or equally likely and before it."""
    return mass - 1 - tl.minimum((draw * mass.to(tl.float64)).to(tl.int64), mass - 1)
