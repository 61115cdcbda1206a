"""What a caller of the model asks: its adapters, a row each, and which of the base's arguments say how many rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.utils import ModelOutput

from lorakit.errors import AdapterIdsError

AdapterIds: TypeAlias = str | Sequence[str | None] | None
AloraOffsets: TypeAlias = Sequence[int | None] | None

# Where a batch's rows are counted, in this order; whatever else is a tensor comes after.
_ROW_INPUTS = ("input_ids", "inputs", "inputs_embeds", "encoder_outputs", "decoder_input_ids", "attention_mask")


def ids_of(adapter_ids: AdapterIds, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, ...]:
    """`adapter_ids` by rows: the name of each, or none at all.

    Args:
        adapter_ids: as `MultiLoraModel.forward` takes them.
        args: of the base.
        kwargs: of the base.

    Raises:
        AdapterIdsError: they are no names, or not as many as rows.
    """
    if adapter_ids is None:
        return ()
    rows = _count_rows(args, kwargs)
    try:
        ids = [adapter_ids] * rows if isinstance(adapter_ids, str) else list(adapter_ids)
    except TypeError as error:
        message = f"adapter_ids is {adapter_ids!r}; give a name, or one a row (None for the base)."
        raise AdapterIdsError(message) from error
    if len(ids) != rows:
        raise AdapterIdsError(
            f"adapter_ids has {len(ids)} entries for a batch of {rows} rows; give one a row (None for the base)."
        )
    for name in ids:
        if name is not None and not isinstance(name, str):
            raise AdapterIdsError(f"adapter_ids holds {name!r}; an entry is an adapter's name or None.")
    return tuple(ids)


def named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    return {"input_ids": found.get("inputs"), **found}


def _count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch's rows: the first axis of its first input. A `generate` without inputs starts one row."""
    given = [kwargs[key] for key in _ROW_INPUTS if kwargs.get(key) is not None]
    for value in (*args, *given, *kwargs.values()):
        if isinstance(value, ModelOutput):
            value = value[0]
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return 1
