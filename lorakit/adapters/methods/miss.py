"""MiSS: the input's parts are summed, and one small matrix multiplies the sum.

y = W x + b + Dᵀ Σ_g x_g, where x_g is the g-th run of r inputs, the last one filled up with zeros, and D (r, out) is
trained (peft.tuners.miss.layer.MissLinear). The sum is a product with A[j, i] = 1 where i mod r = j, else 0; B = Dᵀ.
The form "mini" trains (r, mini_r) and repeats it along the outputs. "bat" multiplies the base's blocks, which has full
rank: it is refused, or approximated by SVD where that is asked for.

Source: Kang and Yin 2024 (arXiv 2409.15371).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import MissConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.full_rank import approximated
from lorakit.adapters.methods.full_rank_options import Method
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import check_config, rank, shown
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.methods.svd import refusal
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

CHOICES = ("svd_energy",)

_ITEM = "miss_block"
_BAT = Method((_ITEM,), (rank("r"),), "init_weights miss_dropout mini_r", reads_base=True)


def convert(checkpoint: Checkpoint, base: BaseModel, svd_energy: float | None = None) -> AdapterForm:
    """Converts a MiSS checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    init = checkpoint.config.get("init_weights")
    if init == "bat":
        if svd_energy is not None:
            return approximated(checkpoint, base, _BAT, svd_energy)
        raise refusal(
            checkpoint,
            "init_weights='bat' multiplies the base's weights by blocks, which has full rank and so no low-rank form; "
            "train with init_weights=True or 'mini'",
        )
    mini = init == "mini"
    if init is not None and not isinstance(init, bool) and not mini:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: init_weights={shown(init)} is a kind of MiSS that this lorakit does not know; "
            "upgrade lorakit."
        )
    options = [rank("r"), rank("mini_r")] if mini else [rank("r")]
    check_config(checkpoint, MissConfig, options, harmless="init_weights miss_dropout mini_r")
    grouped = parts_of(checkpoint, base, "a MiSS", [_ITEM])
    modules = {path: _module(checkpoint, base, path, items, mini) for path, items in grouped.modules.items()}
    return AdapterForm("miss", modules, dict(checkpoint.config), grouped.kept)


def _module(
    checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor], mini: bool
) -> ModuleForm:
    """One module's form."""
    place = linear_at(checkpoint, base, path)
    r = checkpoint.config["r"]
    width = checkpoint.config["mini_r"] if mini else place.out_features
    if r > place.in_features:
        raise ShapeMismatchError(f"{checkpoint.source}: r={r} is more than the {place.in_features} inputs of {path}.")
    if place.out_features % width:
        raise CheckpointError(
            f"{checkpoint.source}: mini_r={width} does not divide the {place.out_features} outputs of {path}."
        )
    block = tensors_at(checkpoint, path, items, {_ITEM: (r, width)})[_ITEM]
    a = torch.eye(r).repeat(1, -(-place.in_features // r))[:, : place.in_features]
    return module_form(place, a, block.float().repeat(1, place.out_features // width).T)
