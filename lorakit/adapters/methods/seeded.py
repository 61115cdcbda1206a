"""Random tensors that PEFT does not save but draws again: the seed, and the dtype that they are rounded to.

PEFT draws them in fp32, casts them to the dtype of the base's weight at the module, and then casts all low precision
back to fp32 (peft.tuners.tuners_utils: BaseTunerLayer._move_adapter_to_device_of_base_layer, cast_adapter_dtype). So
what it computes with depends on the base's dtype, and so does the form.
"""

from __future__ import annotations

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.methods.options import Option
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError


def seed(name: str) -> Option:
    """A seed that must be there: torch and NumPy take these."""
    return Option(
        name, lambda value: type(value) is int and 0 <= value < 1 << 62, "a whole number from 0 to 2⁶²", needed=True
    )


def rounded(checkpoint: Checkpoint, base: BaseModel, path: str, tensor: torch.Tensor) -> torch.Tensor:
    """A drawn fp32 tensor with the values that PEFT gives it at a module.

    Raises:
        UnsupportedMethodError: the module's weight is packed, so its dtype does not say what PEFT would round to.
    """
    weight = base.stored(f"{path}.weight")
    if weight is None or not weight.is_floating_point():
        raise UnsupportedMethodError(
            f"{checkpoint.source}: its random tensors are not saved, and PEFT rounds them to the dtype of the base's "
            f"weight at {path}, which is packed or not in memory; save them with the adapter, or give a plain base."
        )
    return tensor.to(weight.dtype).float()


def check_saved(checkpoint: Checkpoint, option: str, saved: bool, what: str, there: bool) -> None:
    """Refuses random tensors that are there against the configuration, or are not.

    Args:
        checkpoint: the checkpoint.
        option: that says whether they are saved.
        saved: its value.
        what: the tensors, in words.
        there: whether the checkpoint has them.

    Raises:
        CheckpointError: they do not agree.
    """
    if saved != there:
        raise CheckpointError(
            f"{checkpoint.source}: {option} is {str(saved).lower()}, but {what} "
            f"{'are' if there else 'are not'} in the checkpoint; save the adapter again."
        )
