"""A base, loaded by the name of its class."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from lorakit.adapters.base import architecture_class
from lorakit.errors import BaseModelNotFoundError


def load_base(base: str | os.PathLike[str], architecture: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a base, in evaluation mode.

    Args:
        base: a folder or a Hub id.
        architecture: its class in transformers, by name.
        **kwargs: for its `from_pretrained`.

    Raises:
        BaseModelNotFoundError: no such base, or transformers lacks the class.
    """
    model_class = architecture_class(architecture)
    try:
        model: PreTrainedModel = model_class.from_pretrained(base, **{"dtype": "auto", **kwargs})
    except (torch.OutOfMemoryError, ImportError, TypeError):
        raise  # the machine's fault, or the call's; not the base's
    except Exception as error:  # a damaged base makes transformers raise nearly anything
        raise BaseModelNotFoundError(
            f"the base model {str(base)!r} cannot be loaded: {error} ({type(error).__name__}). "
            "Check the folder or the Hub id, and download it again if it is damaged."
        ) from error
    return model.eval()
