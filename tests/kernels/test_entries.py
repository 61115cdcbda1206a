"""What an entry of the address table holds."""

import struct

import pytest
import torch

from lorakit_kernels.entries import WORDS, entry


def test_the_words_of_an_entry():
    a, b = torch.zeros(3, 16), torch.zeros(3, 40)
    c, d = torch.ones(40), torch.zeros(40)
    words = entry(a, b, 0.37, c, d)
    assert len(words) == WORDS
    assert words[:5] == [a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), 3]
    assert words[6:] == [0, 0]


def test_what_is_missing_is_zero():
    assert entry(None, None, 1.0, None, None)[:5] == [0] * 5
    c = torch.ones(40)
    assert entry(None, None, 1.0, c, None)[:5] == [0, 0, c.data_ptr(), 0, 0]


@pytest.mark.parametrize("scale", [1.0, 0.37, -2.0, 0.0, 1e-30, 3e38])
def test_the_scale_is_an_fp32_in_the_low_half(scale):
    word = entry(None, None, scale, None, None)[5]
    assert 0 <= word < 2**32
    stored = torch.tensor([word], dtype=torch.int64)
    assert stored.view(torch.float32)[0].item() == struct.unpack("f", struct.pack("f", scale))[0]


def test_words_fit_a_table():
    a, b = torch.zeros(3, 16), torch.zeros(3, 40)
    table = torch.zeros(2, 3, WORDS, dtype=torch.int64)
    table[1, 2] = torch.tensor(entry(a, b, -0.37, None, None))
    assert table[1, 2].tolist() == entry(a, b, -0.37, None, None)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_factors_lie_at_multiples_of_16_bytes(offset):
    lain = torch.zeros(3 * 16 + offset)[offset:].view(3, 16)
    well = torch.zeros(3, 16)
    for a, b in ((lain, well), (well, lain)):
        with pytest.raises(AssertionError, match="16 bytes"):
            entry(a, b, 1.0, None, None)


def test_factors_are_contiguous():
    a = torch.zeros(16, 3).T
    with pytest.raises(AssertionError):
        entry(a, torch.zeros(3, 16), 1.0, None, None)
