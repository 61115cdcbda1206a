from __future__ import annotations

import pytest
import torch

from lorakit.adapters.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (1,)])
def test_as_torch_says(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    largest = torch.finfo(dtype).max
    for value in (0.0, -0.0, largest, -largest, torch.finfo(dtype).smallest_normal):
        assert is_finite(torch.full(shape, value, dtype=dtype))
    for value in (float("inf"), float("-inf"), float("nan"), -float("nan")):
        tensor = torch.full(shape, largest, dtype=dtype)
        tensor.view(-1)[-1] = value
        assert not tensor.isfinite().all() and not is_finite(tensor)
        assert not is_finite(tensor.flatten().expand(2, -1).T)
        assert not is_finite(tensor[-1])


def test_every_pattern_of_16_bits() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)
        for value, finite in zip(values.view(-1, 1), values.isfinite().tolist(), strict=True):
            assert is_finite(value) == finite


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, 3))
