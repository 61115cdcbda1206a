"""PEFT's methods, one file a family: checkpoint → canonical form, and back.

A family's module offers two functions, found by the checkpoint's PEFT type:

    convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm
    restore(form: AdapterForm) -> dict[str, torch.Tensor]      # PEFT keys without "base_model.model."

To add a family, write its file and name it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import lora
from lorakit.adapters.peft_reader import PREFIX, Checkpoint
from lorakit.errors import UnsupportedMethodError


class Family(Protocol):
    """What a file of this folder offers."""

    def convert(self, checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
        """The checkpoint's canonical form over this base."""
        ...

    def restore(self, form: AdapterForm) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors, by PEFT key without "base_model.model."."""
        ...


FAMILIES: Mapping[str, Family] = {"LORA": lora}

_PROMPTS = "it adds virtual tokens or a side network, and changes no module's weights"
_ROUTERS = "its router decides anew for every token, so it has no fixed form"
_REFUSED = {
    **dict.fromkeys(
        ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"], _PROMPTS
    ),
    **dict.fromkeys(["ADAPTION_PROMPT", "SHADOW"], _PROMPTS),
    **dict.fromkeys(["XLORA", "LILY"], _ROUTERS),
}


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a checkpoint by the family of its PEFT type.

    Raises:
        UnsupportedMethodError: no family for this type, or an option of it that has no exact form.
        CheckpointError: keys are missing, unknown, or do not fit the base.
    """
    family = FAMILIES.get(checkpoint.peft_type)
    if family is None:
        reason = _REFUSED.get(checkpoint.peft_type, f"lorakit converts {', '.join(sorted(FAMILIES))}")
        raise UnsupportedMethodError(f"{checkpoint.source}: PEFT's {checkpoint.peft_type} is not served: {reason}.")
    return family.convert(checkpoint, base)


def restore(form: AdapterForm) -> dict[str, torch.Tensor]:
    """The PEFT checkpoint of a form: PEFT key → tensor, bit for bit as it was exported."""
    family = FAMILIES[str(form.config["peft_type"]).upper()]
    return {PREFIX + key: tensor for key, tensor in family.restore(form).items()}
