"""A checkpoint's tensors, sorted by module: what every family starts from.

Knows PEFT's keys as paths and endings; knows no method's mathematics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import ModuleForm
from lorakit.adapters.methods.targets import check_modules
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, ShapeMismatchError

_WRAPPERS = (".base_layer.", ".token_adapter.", ".ln_tuning_layers.")
"""Attributes of PEFT's layers that hold a module of the base, or a copy of it."""


class Parts(NamedTuple):
    """A checkpoint's tensors.

    Attributes:
        modules: module path → the end of its key → tensor; the modules are those that the configuration targets.
        shared: key → tensor, of what belongs to no module.
        kept: key → tensor, of all that the checkpoint says: everything but unchanged copies of the base's weights. A
            checkpoint made of these is as PEFT saves it with save_embedding_layers=False.
    """

    modules: Mapping[str, Mapping[str, torch.Tensor]]
    shared: Mapping[str, torch.Tensor]
    kept: Mapping[str, torch.Tensor]


def parts_of(
    checkpoint: Checkpoint, base: BaseModel, what: str, items: Collection[str], shared: Collection[str] = ()
) -> Parts:
    """Sorts the tensors, and checks that they are of the modules that the configuration targets.

    Args:
        checkpoint: the checkpoint.
        base: the base model.
        what: the method's name for messages, with its article ("a LoRA").
        items: what a module's keys can end with, without the dot before it; none for a method that keeps nothing
            of a module's own.
        shared: whole keys of what belongs to no module.

    Raises:
        CheckpointError: a key of no known meaning, no tensor at all, or tensors for other modules than are targeted.
        ModuleNotFoundInBaseError: the base lacks a module.
    """
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    common: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    ends = {item: f".{item}" for item in items}
    for key, tensor in checkpoint.tensors.items():
        item = next((item for item, end in ends.items() if key.endswith(end)), None)
        if key in shared:
            common[key] = tensor
        elif item is not None:
            modules[key.removesuffix(ends[item])][item] = tensor
        elif _is_base_copy(key, tensor, base):
            continue
        else:
            raise CheckpointError(
                f"{checkpoint.source}: the key {key!r} is not part of {what} checkpoint, "
                "and is no copy of the base's weight either."
            )
        kept[key] = tensor
    if items and not modules:
        named = " and ".join(item.removesuffix(".weight") for item in list(items)[:2])
        raise CheckpointError(f"{checkpoint.source}: the checkpoint holds no {named}; save the adapter again.")
    if items:
        check_modules(checkpoint, base, modules)
    return Parts(dict(modules), common, kept)


def check_items(checkpoint: Checkpoint, path: str, items: Collection[str], wanted: Collection[str]) -> None:
    """Refuses a module that has other tensors than its configuration calls for.

    Args:
        checkpoint: the checkpoint.
        path: the module's path.
        items: the ends of the keys that it has.
        wanted: those that it should have.

    Raises:
        CheckpointError: naming the first that is missing, or for which there is no use.
    """
    missing = [item for item in wanted if item not in items]
    if missing:
        raise CheckpointError(f"{checkpoint.source}: {path} has no {missing[0]}; the file is incomplete.")
    surplus = [item for item in items if item not in wanted]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.source}: {path} has a {surplus[0]}, which its configuration has no use for; "
            "save the adapter again."
        )


def check_shape(source: str, what: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape than its configuration and the base want.

    Raises:
        ShapeMismatchError: naming it.
    """
    if tensor.shape != expected:
        raise ShapeMismatchError(
            f"{source}: {what} has shape {tuple(tensor.shape)}, but its configuration and the base want {expected}."
        )


def check_indices(source: str, what: str, indices: torch.Tensor, size: int) -> None:
    """Refuses indices out of 0 … size − 1: where torch does not look, they would reach memory of others.

    Raises:
        CheckpointError: naming them.
    """
    if indices.numel() and (indices.min() < 0 or indices.max() >= size):
        raise CheckpointError(f"{source}: {what} has an index out of 0 to {size - 1}; save the adapter again.")


def module_form(
    place: Place,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scale: float = 1.0,
    c: torch.Tensor | None = None,
    d: torch.Tensor | None = None,
    w: torch.Tensor | None = None,
) -> ModuleForm:
    """The form at a place.

    Args:
        place: where.
        a: A (r, in), also for an embedding.
        b: B (out, r).
        scale: s.
        c: (out,), or None for ones.
        d: (out,), or None for zeros.
        w: a whole weight, as in `ModuleForm`.
    """
    if place.kind == "embedding" and a is not None:
        a = a.T
    return ModuleForm(
        place.kind,
        place.in_features,
        place.out_features,
        None if a is None else a.contiguous(),
        None if b is None else b.contiguous(),
        scale,
        None if c is None else c.float().contiguous(),
        None if d is None else d.float().contiguous(),
        None if w is None else w.contiguous(),
    )


def parameter_of(key: str) -> str:
    """The base's parameter that a key stands for, if it is of a whole tensor: without what PEFT puts around modules."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, ".")
    return key


def _is_base_copy(key: str, tensor: torch.Tensor, base: BaseModel) -> bool:
    """PEFT writes whole embeddings beside an adapter on them; unchanged copies say nothing that the base does not."""
    weight = base.parameter(parameter_of(key))
    if weight is None or weight.shape != tensor.shape:
        return False
    weight = weight.to(tensor.device)
    return torch.equal(weight.to(tensor.dtype), tensor) or torch.equal(tensor.to(weight.dtype), weight)
