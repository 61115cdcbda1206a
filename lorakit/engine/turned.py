"""A base on the CPU, for batches of 8 to 32 tokens: linear modules compute W xᵀ, not x Wᵀ.

The result is the same but for the order of its sums. MKL, torch's BLAS on x86, takes half to nine tenths of the time
this way round for so few rows in fp32 (2 cores of a Xeon, widths of 576 to 8,192); with fewer or more it is slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from lorakit.runtime.layers import is_plain_linear

FEWEST, MOST = 8, 32
"""Rows, from and to."""


@contextmanager
def turned(model: nn.Module) -> Iterator[None]:
    """Inside, a model's plain linear modules that are on the CPU and in fp32 compute this way; without MKL, none."""
    found = model.modules() if torch.backends.mkl.is_available() else ()
    modules = [module for module in found if is_plain_linear(module) and _is_turned(module)]
    for module in modules:
        vars(module)["forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


def _is_turned(module: nn.Linear) -> bool:
    """Whether it is on the CPU, in fp32, and its forward is the class's own."""
    return "forward" not in vars(module) and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _forward(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    rows = input.numel() // input.shape[-1]
    if not FEWEST <= rows <= MOST or torch.compiler.is_compiling():
        return nn.functional.linear(input, module.weight, module.bias)
    y = torch.mm(module.weight, input.reshape(rows, -1).mT).mT.contiguous()
    if module.bias is not None:
        y += module.bias
    return y.view(*input.shape[:-1], -1)
