"""PEFT's methods, one file a family: checkpoint → canonical form, and back.

A family's module is found by the checkpoint's PEFT type, and offers

    convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm
    restore(form: AdapterForm) -> dict[str, torch.Tensor]      # keys as in a Checkpoint

`restore` may be left out where the form keeps the checkpoint's tensors as its extras. A family that leaves something to
the user names it in `CHOICES`, a tuple of attributes of `Choices`, and `convert` takes these as keyword arguments. To
add a family here, write its file and name it in `FAMILIES`. A package of your own adds one by an entry point of the
group "lorakit.methods", named as the PEFT type is, whose object has these functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.choices import NONE, Choices
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.layout import weight_dtype
from lorakit.adapters.methods import (
    adalora,
    adamss,
    beft,
    deft,
    delora,
    full_rank,
    glora,
    gralora,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    peanut,
    poly,
    psoft,
    pvera,
    tinylora,
    tokens,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    vocabulary,
    whole,
)
from lorakit.adapters.peft_reader import Checkpoint, full_key
from lorakit.errors import ConfigError, UnsupportedMethodError

FAMILIES: Mapping[str, Any] = {
    "ADALORA": adalora,
    "ADAMSS": adamss,
    "BEFT": beft,
    "DEFT": deft,
    "DELORA": delora,
    "GLORA": glora,
    "GRALORA": gralora,
    "HRA": hra,
    "IA3": ia3,
    "LN_TUNING": ln_tuning,
    "LOHA": loha,
    "LOKR": lokr,
    "LORA": lora,
    "MISS": miss,
    "PEANUT": peanut,
    "POLY": poly,
    "PSOFT": psoft,
    "PVERA": pvera,
    "TINYLORA": tinylora,
    "TRAINABLE_TOKENS": trainable_tokens,
    "UNILORA": unilora,
    "VBLORA": vblora,
    "VERA": vera,
    **dict.fromkeys(full_rank.METHODS, full_rank),
}
"""PEFT type → the module of its family."""

_DTYPE = ".dtype"
"""An extra without elements, in the dtype of the family's A and B, where the form has wider tensors beside them."""

_PROMPTS = "it adds virtual tokens or a side network, and changes no module's weights"
_ROUTERS = "its router decides anew for every token, so it has no fixed form"
_REFUSED = {
    **dict.fromkeys(
        ["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"], _PROMPTS
    ),
    **dict.fromkeys(["ADAPTION_PROMPT", "SHADOW"], _PROMPTS),
    **dict.fromkeys(["XLORA", "LILY"], _ROUTERS),
}


def convert(checkpoint: Checkpoint, base: BaseModel, choices: Choices = NONE) -> AdapterForm:
    """Converts a checkpoint by the family of its PEFT type.

    Args:
        checkpoint: the checkpoint.
        base: the base that it was trained on.
        choices: what the user chose; what has an exact form stays exact.

    Raises:
        UnsupportedMethodError: no family for this type, or an option of it that has no exact form.
        ConfigError: a task was chosen of a method that has none, or one that is not there.
        CheckpointError: keys are missing, unknown, or do not fit the base.
    """
    family = _family(checkpoint.peft_type)
    if family is None:
        reason = _REFUSED.get(checkpoint.peft_type, f"lorakit converts {', '.join(sorted(FAMILIES))}")
        raise UnsupportedMethodError(f"{checkpoint.source}: PEFT's {checkpoint.peft_type} is not served: {reason}.")
    taken = getattr(family, "CHOICES", ())
    if choices.task_id is not None and "task_id" not in taken:
        raise ConfigError(
            f"{checkpoint.source}: task_id={choices.task_id} was chosen, but a {checkpoint.peft_type} has no tasks; "
            "leave it out."
        )
    # Whatever PEFT saves beside a method's own tensors is set apart, and put back in the other order.
    resized = vocabulary.set_apart(checkpoint, base)
    without_tokens = tokens.set_apart(resized.checkpoint, resized.base)
    apart = whole.set_apart(without_tokens.checkpoint, resized.base)
    chosen = {name: getattr(choices, name) for name in taken}
    own: AdapterForm = family.convert(apart.checkpoint, apart.base, **chosen)
    form = whole.put_back(own, apart, without_tokens.checkpoint, resized.base)
    form = tokens.put_back(form, without_tokens, resized.checkpoint, resized.base)
    form = vocabulary.put_back(form, resized, checkpoint, base)
    beside = resized.modules or without_tokens.modules or apart.tensors
    if beside and form.rank and (dtype := weight_dtype(own)) != weight_dtype(form):
        form = dataclasses.replace(form, extras={**form.extras, _DTYPE: torch.empty(0, dtype=dtype)})
    return form


def restore(form: AdapterForm, base: Callable[[], BaseModel] = vocabulary.no_base) -> dict[str, torch.Tensor]:
    """The PEFT checkpoint of a form: PEFT key → tensor, bit for bit as it was exported, without copies of the base.

    Args:
        form: the form.
        base: opens the base that it was converted over; called only for an adapter that adds tokens to the vocabulary.

    Raises:
        BaseModelNotFoundError: the base is needed and is not there.
    """
    family = _family(str(form.config["peft_type"]).upper())
    form, copies = vocabulary.joined(form, base)
    form = _narrowed(tokens.without(form))
    tensors = family.restore(form) if hasattr(family, "restore") else form.extras
    return {full_key(key): tensor for key, tensor in (whole.give_back(form, tensors) | copies).items()}


def _narrowed(form: AdapterForm) -> AdapterForm:
    """The form with A and B in the dtype that they had before wider tensors were stored beside them."""
    if _DTYPE not in form.extras:
        return form
    dtype = form.extras[_DTYPE].dtype
    modules = {
        path: dataclasses.replace(module, a=module.a.to(dtype), b=module.b.to(dtype))
        if module.a is not None and module.b is not None and torch.promote_types(module.b.dtype, dtype) != dtype
        else module
        for path, module in form.modules.items()
    }
    extras = {key: tensor for key, tensor in form.extras.items() if key != _DTYPE}
    return dataclasses.replace(form, modules=modules, extras=extras)


@cache
def _family(peft_type: str) -> Any:
    """The family of a PEFT type: ours, or one that another package adds; None if there is none."""
    if peft_type in FAMILIES:
        return FAMILIES[peft_type]
    added = entry_points(group="lorakit.methods", name=peft_type)
    return next((entry.load() for entry in added), None)
