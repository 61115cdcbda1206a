"""Uni-LoRA: every element of every A and B is an element of one trained vector θ, times a fixed scale.

y = W x + b + B A x with A = θ[i_A] ⊙ s_A and B = θ[i_B] ⊙ s_B (peft.tuners.unilora.layer.Linear). The indices and
scales are in the checkpoint (save_indices), or made again from proj_seed as peft.UniLoraModel makes them: one draw for
all modules in the order of the model, and s = 1/√(how often the element of θ is used), in the dtype of the base.

Source: Li et al. 2025 (arXiv 2506.00799).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from peft import UniLoraConfig
from peft.tuners.unilora.model import UniLoraModel

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import seeded
from lorakit.adapters.methods.linears import linear_at
from lorakit.adapters.methods.options import check_config, check_size, flag, rank
from lorakit.adapters.methods.parts import check_items, check_shape, module_form, parts_of
from lorakit.adapters.methods.targets import targeted
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError

_THETA = "base_model.unilora_theta_d"
_FACTORS = ("A", "B")
_ITEMS = [f"unilora_{kind}_{factor}" for kind in ("indices", "scales") for factor in _FACTORS]

_Drawn = Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor]]]
"""Module path → "A" and "B" → indices and scales."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a Uni-LoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config, source = checkpoint.config, checkpoint.source
    check_config(
        checkpoint,
        UniLoraConfig,
        [rank("r"), rank("theta_d_length"), flag("save_indices"), seeded.seed("proj_seed")],
        harmless="unilora_dropout init_theta_d_bound init_weights",
    )
    saved = bool(config.get("save_indices"))
    there = any(f".{item}" in key for key in checkpoint.tensors for item in _ITEMS)
    seeded.check_saved(checkpoint, "save_indices", saved, "the indices and scales", there)
    grouped = parts_of(checkpoint, base, "a Uni-LoRA", _ITEMS if saved else (), (_THETA,))
    if _THETA not in grouped.shared:
        raise CheckpointError(f"{source}: the vector ({_THETA}) is missing; the file is incomplete.")
    theta = grouped.shared[_THETA]
    check_shape(source, "the Uni-LoRA vector", theta, (config["theta_d_length"],))
    places = _places(checkpoint, base, grouped.modules if saved else targeted(checkpoint, base))
    drawn = _stored(checkpoint, places, grouped.modules) if saved else _drawn(checkpoint, base, places)

    def factor(path: str, name: str) -> torch.Tensor:
        indices, scales = drawn[path][name]
        return (theta.double()[indices] * scales.double()).float()

    modules = {path: module_form(place, factor(path, "A"), factor(path, "B")) for path, place in places.items()}
    return AdapterForm("unilora", modules, dict(config), grouped.kept, uses_base_weights=not saved)


def _places(checkpoint: Checkpoint, base: BaseModel, paths: Collection[str]) -> dict[str, Place]:
    """The places at these paths, in the order of the model."""
    places = {path: linear_at(checkpoint, base, path) for path in base.places if path in paths}
    r = checkpoint.config["r"]
    if not places:
        raise CheckpointError(f"{checkpoint.source}: target_modules names no module of the base.")
    for path, place in places.items():
        # No tensor bounds r where the indices are drawn again: a wrong one would take all memory.
        if r > max(place.in_features, place.out_features):
            raise CheckpointError(f"{checkpoint.source}: r is {r}, more than {path} is wide; save the adapter again.")
    check_size(checkpoint, "r", sum(r * (place.in_features + place.out_features) for place in places.values()))
    return places


def _shapes(checkpoint: Checkpoint, place: Place) -> dict[str, tuple[int, int]]:
    r = checkpoint.config["r"]
    return {"A": (r, place.in_features), "B": (place.out_features, r)}


def _stored(
    checkpoint: Checkpoint, places: Mapping[str, Place], modules: Mapping[str, Mapping[str, torch.Tensor]]
) -> _Drawn:
    """The checkpoint's own indices and scales."""
    source, length = checkpoint.source, checkpoint.config["theta_d_length"]
    stored: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for path, items in modules.items():
        check_items(checkpoint, path, items, _ITEMS)
        stored[path] = {}
        for factor, shape in _shapes(checkpoint, places[path]).items():
            indices, scales = items[f"unilora_indices_{factor}"], items[f"unilora_scales_{factor}"]
            check_shape(source, f"unilora_indices_{factor} of {path}", indices, shape)
            check_shape(source, f"unilora_scales_{factor} of {path}", scales, shape)
            if indices.min() < 0 or indices.max() >= length:
                raise CheckpointError(
                    f"{source}: unilora_indices_{factor} of {path} has an index out of the vector; "
                    "save the adapter again."
                )
            stored[path][factor] = indices.long(), scales
    return stored


def _drawn(checkpoint: Checkpoint, base: BaseModel, places: Mapping[str, Place]) -> _Drawn:
    """Indices and scales as peft.UniLoraModel._assign_unilora_indices_and_scales makes them."""
    length = checkpoint.config["theta_d_length"]
    shapes = {
        (path, factor): shape for path, place in places.items() for factor, shape in _shapes(checkpoint, place).items()
    }
    sizes = [rows * columns for rows, columns in shapes.values()]
    indices = UniLoraModel.generate_index(sum(sizes), length, checkpoint.config["proj_seed"])
    scales = torch.bincount(indices, minlength=length).float().rsqrt()  # those that are not used are not read
    drawn: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {path: {} for path in places}
    for ((path, factor), shape), chunk in zip(shapes.items(), indices.split(sizes), strict=True):
        chosen = chunk.view(shape)
        drawn[path][factor] = chosen, seeded.rounded(checkpoint, base, path, scales)[chosen]
    return drawn
