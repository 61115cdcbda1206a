"""Segmented low-rank products: many adapters on one batch.

A kernel package of its own: it knows tensors alone, and nothing of lorakit, PEFT or transformers. It is installed with
lorakit, and can be loaded from the Hub under any other name, so its modules import each other relatively.

What needs Triton is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .entries import entry
from .plan import plan
from .stacked import Stack, Whole, replaced, stacked_lora

if TYPE_CHECKING:
    from .linear import can_join, linears
    from .paged import attend, can_attend
    from .sampling import sample
    from .sgmv import expand_, lookup, replace_, shrink

_BY_TRITON = {
    "attend": "paged",
    "can_attend": "paged",
    "can_join": "linear",
    "expand_": "sgmv",
    "linears": "linear",
    "lookup": "sgmv",
    "replace_": "sgmv",
    "sample": "sampling",
    "shrink": "sgmv",
}

__all__ = [
    "Stack",
    "Whole",
    "attend",
    "can_attend",
    "can_join",
    "entry",
    "expand_",
    "linears",
    "lookup",
    "plan",
    "replace_",
    "replaced",
    "sample",
    "shrink",
    "stacked_lora",
]


def __getattr__(name: str) -> Any:
    if name in _BY_TRITON:
        module = importlib.import_module(f".{_BY_TRITON[name]}", __name__)
        return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
