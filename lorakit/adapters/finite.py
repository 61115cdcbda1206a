"""Does a tensor hold NaN or Inf?

Knows bits of floating-point numbers; knows no adapter.
"""

from __future__ import annotations

import numpy
import torch

# dtype → its bits as whole numbers, signed and not, and the bits of infinity, without the sign's and with it.
_BITS = {
    torch.float32: (torch.int32, numpy.int32, numpy.uint32, 0x7F80_0000, 0xFF80_0000),
    torch.bfloat16: (torch.int16, numpy.int16, numpy.uint16, 0x7F80, 0xFF80),
    torch.float16: (torch.int16, numpy.int16, numpy.uint16, 0x7C00, 0xFC00),
}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is a number. At the speed of memory on the CPU, in one thread.

    Args:
        tensor: of any shape, floating point.
    """
    if tensor.dtype not in _BITS or tensor.device.type != "cpu":
        return bool(tensor.isfinite().all())
    return are_finite(tensor.detach().view(_BITS[tensor.dtype][0]).numpy(), tensor.dtype)


def are_finite(bits: numpy.ndarray, dtype: torch.dtype) -> bool:
    """Whether whole numbers are the bits of finite ones.

    Signed, NaN and +Inf are the largest, and unsigned those of the other sign: two maxima decide exactly, without a
    mask as large as the array.

    Args:
        bits: of any shape, in whole numbers of the dtype's size; or (n,) their bytes.
        dtype: float32, bfloat16 or float16.
    """
    if not bits.size:
        return True
    _, signed, unsigned, infinity, above = _BITS[dtype]
    largest = numpy.maximum.reduce
    return bool(largest(bits.view(signed), axis=None) < infinity and largest(bits.view(unsigned), axis=None) < above)
