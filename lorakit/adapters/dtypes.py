"""The dtypes a bank may hold, under torch's names and under safetensors' codes.

Knows names and sizes; knows no tensor and no file.
"""

from __future__ import annotations

import torch

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What A and B may be stored in. float64 is refused when a checkpoint is read: no kernel serves it."""

SAFETENSORS_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""All dtypes that a safetensors file can hold and torch can read back."""

SAFETENSORS_DTYPES = {code: dtype for dtype, code in SAFETENSORS_CODES.items()}
"""safetensors' code → dtype."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name in bank.json, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


WEIGHT_NAMES = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}
"""Name → dtype, of those that A and B may be stored in."""

DTYPES = {dtype_name(dtype): dtype for dtype in SAFETENSORS_CODES}
"""Name in bank.json → dtype."""
