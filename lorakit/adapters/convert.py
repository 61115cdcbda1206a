"""A source → its canonical form over a base: read, convert, check. The one way by which adapters come in.

A bank takes adapters through it, and so does a live model, so that both refuse the same things in the same words.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.choices import NONE, Choices
from lorakit.adapters.dtypes import WEIGHT_DTYPES
from lorakit.adapters.finite import is_finite
from lorakit.adapters.form import WEIGHTS, AdapterForm, named
from lorakit.adapters.methods import convert as convert_checkpoint
from lorakit.adapters.peft_reader import Checkpoint, Source, read_checkpoint
from lorakit.errors import ConfigError, NonFiniteWeightsError


def convert(
    name: str,
    source: Source | Checkpoint,
    base: BaseModel,
    dtype: torch.dtype | None = None,
    choices: Choices = NONE,
    *,
    check_finite: bool = True,
) -> AdapterForm:
    """Reads a source and converts it.

    Args:
        name: the adapter's name, for messages.
        source: a PEFT folder, a Hub id, a live `PeftModel`, or a checkpoint already read.
        base: the base that it was trained on.
        dtype: what A, B, w and t are cast to; None keeps the checkpoint's own, so that it can be written back bit for
            bit.
        choices: what the user chose where the checkpoint leaves it open.
        check_finite: refuse NaN and Inf here. A bank does so while it writes, and once is enough; what is cast is
            checked in any case, as afterwards nobody could tell what was too large from what was broken.

    Raises:
        CheckpointError, UnsupportedMethodError, ModuleNotFoundInBaseError: see `peft_reader` and `methods`.
        NonFiniteWeightsError: NaN or Inf, in the checkpoint or after the cast.
        ConfigError: adapters are not kept in this dtype, or a choice that the checkpoint does not leave open.
    """
    check_dtype(dtype)
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    form = convert_checkpoint(checkpoint, base, choices)
    if form.uses_base_weights:
        form = dataclasses.replace(form, base_quantisation=base.quantisation)
    if check_finite or dtype is not None:
        form.check_finite(name)
    if dtype is not None:
        form = cast(form, dtype)
        _check_range(form, name, dtype)
    return form


def check_dtype(dtype: object) -> None:
    """Refuses a dtype that A and B are not kept in.

    Raises:
        ConfigError: naming those that they are.
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ConfigError(
            f"dtype is {dtype!r}; use {', '.join(map(str, WEIGHT_DTYPES))}, or None for each adapter's own."
        )


def _check_range(form: AdapterForm, name: str, dtype: torch.dtype) -> None:
    shown = str(dtype).removeprefix("torch.")
    for path, module in form.modules.items():
        for item, tensor in module.tensors():
            if not is_finite(tensor):
                raise NonFiniteWeightsError(
                    f"adapter {name!r}: {named(item)} of {path} has values larger than {shown} holds; "
                    "keep it in float32 or bfloat16."
                )


def cast(form: AdapterForm, dtype: torch.dtype) -> AdapterForm:
    """The form with A, B, w and t in another dtype; c and d stay fp32."""
    modules = {}
    for path, module in form.modules.items():
        weights: dict[str, Any] = {item: tensor.to(dtype) for item, tensor in module.tensors() if item in WEIGHTS}
        modules[path] = dataclasses.replace(module, **weights)
    return dataclasses.replace(form, modules=modules)
