"""How kernels are launched: dtypes, arguments of up to four siblings, options that not every device has."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from .limits import MOST_SIBLINGS

_T = TypeVar("_T")
VARYING = ["tokens", "tokens_per_row", "column0", "column1", "column2", "column3"]
"""Arguments that differ from batch to batch: kernels are not compiled anew for each."""
FIRSTS = ["first1", "first2", "first3"]
"""The same, of kernels that serve siblings by tiles."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def weight_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a weight dtype."""
    return _TYPES[dtype]


def padded(values: Sequence[_T]) -> list[_T]:
    """Arguments for as many siblings as a kernel takes; those that are not there repeat the first."""
    return [*values, *[values[0]] * (MOST_SIBLINGS - len(values))]


def takes_as_is(dtype: torch.dtype) -> bool:
    """Whether matrix units multiply this dtype without a conversion. Triton's interpreter cannot do it for bf16."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not triton.knobs.runtime.interpret)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
    """Launches a kernel on a device.

    Args:
        kernel: a `triton.jit` function with a constexpr PDL.
        grid: programs along each axis.
        *args: its arguments.
        device: where they lie.
        **options: its constexprs, and Triton's own options.
    """
    if overlaps(device):
        options["launch_pdl"] = True
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, PDL=overlaps(device), **options)
