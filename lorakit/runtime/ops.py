"""The only importer of lorakit_kernels: which backend a device has, and its operators.

Two backends compute y ← c ⊙ (y + s · B A x) + d. The stacked one is plain torch and runs anywhere. The segmented one
(SGMV) is written in Triton and finds every adapter where it lies; it needs a CUDA device and Triton.
"""

from __future__ import annotations

import importlib.util

import torch

from lorakit_kernels.entries import WORDS, entry_words
from lorakit_kernels.limits import MOST_SIBLINGS, RANKS
from lorakit_kernels.plan import COLUMNS as PLAN_COLUMNS
from lorakit_kernels.plan import plan
from lorakit_kernels.stacked import Stack, Whole, replaced, stacked_lora

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    from lorakit_kernels.linear import can_join, linears
    from lorakit_kernels.paged import attend, can_attend
    from lorakit_kernels.sampling import sample
    from lorakit_kernels.sgmv import expand_, lookup, replace_, shrink

__all__ = [
    "HAS_TRITON",
    "MOST_SIBLINGS",
    "PLAN_COLUMNS",
    "RANKS",
    "WORDS",
    "Stack",
    "Whole",
    "attend",
    "can_attend",
    "can_join",
    "entry_words",
    "expand_",
    "has_kernels",
    "linears",
    "lookup",
    "plan",
    "replace_",
    "replaced",
    "sample",
    "shrink",
    "stacked_lora",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the segmented backend serves a model of this dtype on this device."""
    if not HAS_TRITON or dtype not in _DTYPES or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _CAPABILITY
