"""Weights of the base for methods that change them when training begins, and again on every reload.

PEFT makes the change anew from the base's weights, so the checkpoint alone does not say what was trained. Where the
change cannot be made as PEFT makes it, or would reach beyond the adapter's module, it is refused. Knows the base's
weights; knows no method's formula.
"""

from __future__ import annotations

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.methods.targets import place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_of(checkpoint: Checkpoint, base: BaseModel, path: str, method: str, rank: int) -> torch.Tensor:
    """W (out, in) of a linear place in fp32, on the CPU.

    Args:
        checkpoint: the checkpoint.
        base: the base model.
        path: the module's path.
        method: the method's name, for messages.
        rank: how many directions of W it takes.

    Raises:
        UnsupportedMethodError: PEFT cannot make the change there, or it has no form of its own.
        CheckpointError: W has fewer directions.
    """
    source, place = checkpoint.source, place_at(checkpoint, base, path)
    if place.kind != "linear":
        raise UnsupportedMethodError(f"{source}: PEFT has no {method} for {path}, which is an embedding.")
    if rank > min(place.in_features, place.out_features):
        raise CheckpointError(f"{source}: {method} cannot take {rank} directions from the weight of {path}.")
    stored = base.stored(f"{path}.weight")
    weight = base.weight(path)
    if stored is None or stored.dtype not in _DTYPES:
        raise UnsupportedMethodError(
            f"{source}: {method} changes the base's weight of {path}, which is quantised, and quantises it again; "
            "lorakit's base is not changed. Train on a base that is not quantised."
        )
    weight = weight.to("cpu", torch.float32)
    if _is_tied(base, path, weight):
        raise UnsupportedMethodError(
            f"{source}: {method} changes the base's weight of {path}, and with it the embedding that is tied to it; "
            f"train without {path}, or save the adapter with PEFT's path_initial_model_for_weight_conversion."
        )
    return weight


def _is_tied(base: BaseModel, path: str, weight: torch.Tensor) -> bool:
    """An embedding holds the same numbers."""
    return any(
        place.kind == "embedding"
        and (place.in_features, place.out_features) == tuple(weight.shape)
        and torch.equal(base.weight(other).T.to("cpu", torch.float32), weight)
        for other, place in base.places.items()
        if other != path
    )
