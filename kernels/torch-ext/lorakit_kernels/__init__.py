"""Segmented low-rank products: many adapters on one batch.

A kernel package of its own: it knows tensors alone, and nothing of lorakit, PEFT or transformers. It is installed with
lorakit, and can be loaded from the Hub under any other name, so its modules import each other relatively.

What needs Triton is imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .entries import entry
from .plan import plan
from .stacked import Stack, stacked_lora

if TYPE_CHECKING:
    from .sgmv import expand_, lookup, shrink

__all__ = ["Stack", "entry", "expand_", "lookup", "plan", "shrink", "stacked_lora"]


def __getattr__(name: str) -> Any:
    if name in ("expand_", "lookup", "shrink"):
        from . import sgmv

        return globals().setdefault(name, getattr(sgmv, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
