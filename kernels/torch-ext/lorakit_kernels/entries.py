"""The address table: where the parts of an adapter lie, for every slot and module.

A table is int64 of shape (slots, modules, WORDS); one entry fills a 64-byte line:

    word 0   address of A, (r, in) row-major; of an embedding's A, (vocabulary, r)
    word 1   address of B transposed, (r, out) row-major
    word 2   address of c, (out,) fp32, or 0 for ones
    word 3   address of d, (out,) fp32, or 0 for zeros
    word 4   the rank r, 0 without factors
    word 5   the scale s, the bits of an fp32 in the low half
    word 6   address of a whole weight w, (out, in) row-major, an embedding's (vocabulary, out); 0 for the base's

An entry of zeros leaves the module as it is. Addresses are absolute, so a slot may lie anywhere in device memory, and a
slot's update never moves another's. Whoever fills a table keeps the memory alive for as long as kernels may read it.
"""

from __future__ import annotations

import struct

from torch import Tensor

WORDS = 8


def entry_words(a: int, b: int, c: int, d: int, rank: int, scale: float, w: int = 0) -> list[int]:
    """The words of one entry.

    Args:
        a: A's address, a multiple of 16; 0 together with `b` and `rank`.
        b: B's address, a multiple of 16.
        c: c's address, or 0 for ones.
        d: d's address, or 0 for zeros.
        rank: r.
        scale: s.
        w: a whole weight's address, a multiple of 16, or 0; without `a`, `b` and `c`.
    """
    assert a % 16 == b % 16 == w % 16 == 0, "kernels load 16 bytes"
    return [a, b, c, d, rank, struct.unpack("<I", struct.pack("<f", scale))[0], w, 0]


def entry(
    a: Tensor | None, b: Tensor | None, scale: float, c: Tensor | None, d: Tensor | None, w: Tensor | None = None
) -> list[int]:
    """The words of the entry for these tensors, which must outlive it.

    Args:
        a: (r, in), or (vocabulary, r) for an embedding; contiguous. None together with `b`.
        b: (r, out), contiguous, of `a`'s dtype.
        scale: s.
        c: (out,) fp32, contiguous, or None for ones.
        d: (out,) fp32, contiguous, or None for zeros.
        w: (out, in), or (vocabulary, out) for an embedding; contiguous. None for the base's.
    """
    assert all(tensor is None or tensor.is_contiguous() for tensor in (a, b, c, d, w))
    at_a, at_b, at_c, at_d, at_w = (0 if tensor is None else tensor.data_ptr() for tensor in (a, b, c, d, w))
    return entry_words(at_a, at_b, at_c, at_d, 0 if b is None else b.shape[0], scale, at_w)
