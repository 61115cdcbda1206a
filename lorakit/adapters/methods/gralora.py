"""GraLoRA: LoRA in a grid of k × k blocks, each of a k-th of the rank, and perhaps a plain LoRA beside it.

y = W x + b + s · (y' + B_g A_g x), with s = alpha / (r + hybrid_r) (peft.tuners.gralora.layer.Linear). Input block n
and output block j meet in r/k terms of their own:

    y'_j = Σ_n B_j,n A_n,j x_n

A stacks block-diagonally over n. Its rows come in the order (n, j, term), and B's columns put them at the rows of
block j alone: rank k · r, and hybrid_r more. Where that exceeds the module's smaller side, one factor is the identity.

Source: Jung et al. 2025 (arXiv 2505.20355).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import GraloraConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import factors_of, linear_at, tensors_at
from lorakit.adapters.methods.options import Option, check_config, is_whole, number, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import ShapeMismatchError

_GRID = ("gralora_A", "gralora_B")
_GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a GraLoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    hybrid = Option("hybrid_r", is_whole, "a whole number of at least 0")
    check_config(
        checkpoint,
        GraloraConfig,
        [rank("r"), rank("gralora_k"), number("alpha"), hybrid],
        harmless="init_weights gralora_dropout",
    )
    grouped = parts_of(checkpoint, base, "a GraLoRA", (*_GRID, *_GENERAL))
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    return AdapterForm("gralora", modules, dict(checkpoint.config), grouped.kept)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form."""
    place = linear_at(checkpoint, base, path)
    width, height = place.in_features, place.out_features
    r, k, hybrid = checkpoint.config["r"], checkpoint.config["gralora_k"], checkpoint.config.get("hybrid_r") or 0
    if width % k or height % k:
        raise ShapeMismatchError(
            f"{checkpoint.source}: gralora_k={k} does not divide the {width} inputs and {height} outputs of {path}."
        )
    shapes: dict[str, tuple[int, ...]] = dict(zip(_GRID, ((k, width // k, r), (k, r, height // k)), strict=True))
    if hybrid:
        shapes |= zip(_GENERAL, ((hybrid, width), (height, hybrid)), strict=True)
    tensors = tensors_at(checkpoint, path, items, shapes)
    # In the order (n, input, j, term) and (j, n, term, output).
    grid_a = tensors[_GRID[0]].reshape(k, width // k, k, r // k)
    grid_b = tensors[_GRID[1]].reshape(k, k, r // k, height // k)
    general_a, general_b = (tensors.get(item) for item in _GENERAL)
    if k * r + hybrid > min(width, height):
        delta = torch.einsum("nijs,jnso->joni", grid_a, grid_b).reshape(height, width)
        if general_a is not None and general_b is not None:
            delta = delta + general_b @ general_a
        a, b = factors_of(delta)
    else:
        a = torch.block_diag(*grid_a.flatten(2).transpose(1, 2))
        columns = [torch.block_diag(*grid_b[:, n].transpose(1, 2)) for n in range(k)]
        b = torch.cat(columns, dim=1)
        if general_a is not None and general_b is not None:
            a, b = torch.cat([a, general_a]), torch.cat([b, general_b], dim=1)
    return module_form(place, a.float(), b.float(), checkpoint.config["alpha"] / (r + hybrid))
