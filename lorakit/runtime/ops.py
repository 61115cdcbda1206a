"""The only importer of lorakit_kernels: which backend a device has, and its operators.

Two backends compute y ← c ⊙ (y + s · B A x) + d. The stacked one is plain torch and runs anywhere. The segmented one
(SGMV) is written in Triton and finds every adapter where it lies; it needs a CUDA device and Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from lorakit_kernels.stacked import Stack, stacked_lora

HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    from lorakit_kernels.entries import WORDS, entry_words
    from lorakit_kernels.plan import COLUMNS, plan
    from lorakit_kernels.sgmv import RANKS, expand_, lookup, shrink
    from lorakit_kernels.siblings import MOST as MOST_SIBLINGS

__all__ = [
    "COLUMNS",
    "HAS_TRITON",
    "MOST_SIBLINGS",
    "RANKS",
    "WORDS",
    "SideStream",
    "Stack",
    "entry_words",
    "expand_",
    "has_kernels",
    "lookup",
    "plan",
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


class SideStream:
    """A stream beside the one in which the model computes, for work that need not wait for it.

    Only where it pays: in a CUDA graph, where a launch costs the host nothing. A compiled model, and a host that can
    hardly keep up with launching, stay in one stream; there a kernel starts early by itself (programmatic dependent
    launch).
    """

    def __init__(self, device: torch.device) -> None:
        """Makes no stream before one is needed."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def forked(self) -> Iterator[AbstractContextManager[object]]:
        """From here on the side stream may run; at the end the current stream waits for it.

        Yields:
            The context in which launches go to the side stream.
        """
        if self._device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
            yield nullcontext()
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        yield torch.cuda.stream(self._stream)
        main.wait_stream(self._stream)
