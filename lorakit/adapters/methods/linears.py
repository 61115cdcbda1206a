"""What the methods for linear modules share: their place, a module's tensors, a full product.

Knows places and keys' endings; knows no method's mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.methods.parts import check_items, check_shape
from lorakit.adapters.methods.targets import place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import ShapeMismatchError


def linear_at(checkpoint: Checkpoint, base: BaseModel, path: str) -> Place:
    """The linear module at a path.

    Raises:
        ModuleNotFoundInBaseError: there is no module.
        ShapeMismatchError: it is an embedding.
    """
    place = place_at(checkpoint, base, path)
    if place.kind != "linear":
        raise ShapeMismatchError(
            f"{checkpoint.source}: {path} is an adapter for another kind of module than its {place.kind}."
        )
    return place


def tensors_at(
    checkpoint: Checkpoint, path: str, items: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """A module's tensors in fp64, which must be these and no others.

    Args:
        checkpoint: the checkpoint.
        path: the module's path.
        items: the end of the key → tensor.
        shapes: the end of the key → its shape.

    Raises:
        CheckpointError: a tensor is missing, or the configuration leaves no use for it.
        ShapeMismatchError: a tensor has another shape.
    """
    check_items(checkpoint, path, items, shapes)
    for item, shape in shapes.items():
        check_shape(checkpoint.source, f"{item} of {path}", items[item], shape)
    return {item: tensor.to("cpu", torch.float64) for item, tensor in items.items()}


def factors_of(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a product that has no fewer factors than its smaller side: one of them is the identity.

    Args:
        delta: (out, in).
    """
    rows, columns = delta.shape
    eye = torch.eye(min(rows, columns), dtype=delta.dtype)
    return (delta, eye) if rows < columns else (eye, delta)
