"""Segmented low-rank products: many adapters on one batch.

A kernel package of its own: it knows tensors alone, and nothing of lorakit, PEFT or transformers. It is installed with
lorakit, and can be loaded from the Hub under any other name, so its modules import each other relatively.

What needs Triton is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .entries import entry
from .plan import plan
from .stacked import Stack, Whole, replaced, stacked_lora

if TYPE_CHECKING:
    from .sgmv import expand_, lookup, replace_, shrink

_BY_TRITON = ("expand_", "lookup", "replace_", "shrink")

__all__ = [
    "Stack",
    "Whole",
    "entry",
    "expand_",
    "lookup",
    "plan",
    "replace_",
    "replaced",
    "shrink",
    "stacked_lora",
]


def __getattr__(name: str) -> Any:
    if name in _BY_TRITON:
        from . import sgmv

        return globals().setdefault(name, getattr(sgmv, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
