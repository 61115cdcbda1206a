"""Where in a model an adapter can share a batch: modules that are fed row by row.

A hook knows a token's row by its place: the batch's rows lie one after another, each with as many tokens. Experts get
tokens in the router's order: there a place says nothing, and a wrong guess would be silent. Such modules are refused,
and so are vision and audio towers where `towers.py` cannot tell whose an image is. Knows modules and their paths; no
adapter.
"""

from __future__ import annotations

import re

from torch import nn

from lorakit.errors import UnsupportedMethodError
from lorakit.runtime.towers import is_served, tower_paths

_EXPERT = re.compile(r"(^|\.)experts?\.(expert_)?\d+\.")
_SEQUENCE_FIRST = ("xlnet", "fsmt", "led", "longformer", "mask2former", "oneformer")
_BY_MODALITY = re.compile(r"\.(text|vision)_moe(\.|$)")
_NO_ROWS = ("relative_attention_bias",)


def check_placement(model: nn.Module, path: str) -> None:
    """Refuses a module whose tokens do not lie row by row. A batch of one adapter needs no such check.

    Args:
        model: the base.
        path: the module that an adapter sits on.

    Raises:
        UnsupportedMethodError: naming the module and the reason.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _SEQUENCE_FIRST:
        raise UnsupportedMethodError(
            f"adapters of a {model_type} cannot share a batch: it lays tokens out position by position."
        )
    if path.endswith(_NO_ROWS):
        raise UnsupportedMethodError(
            f"an adapter on {path!r} cannot share a batch: it is given positions, which are the same for all rows."
        )
    if _BY_MODALITY.search(path):
        raise UnsupportedMethodError(
            f"an adapter on {path!r} cannot share a batch: it gets one modality's tokens, any number of them a row."
        )
    if _EXPERT.search(path):
        raise UnsupportedMethodError(
            f"an adapter on {path!r} cannot share a batch: experts get their tokens in the router's order."
        )
    if not is_served(model) and tower_paths(model, [path]):
        raise UnsupportedMethodError(
            f"an adapter on {path!r} cannot share a batch: whose an image or a sound is cannot be seen in a "
            f"{model_type}. Train with target_modules that name the language model alone."
        )
