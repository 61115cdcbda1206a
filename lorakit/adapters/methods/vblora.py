"""VB-LoRA: A and B are put together from the vectors of one shared bank.

y = W x + b + B A x (peft.tuners.vblora.layer.Linear). Each stretch of `vector_length` elements of a row of A, or of a
column of B, is Σ_k softmax(logits)_k · bank_k over the `topk` largest of its logits. A checkpoint has the logits, or
with save_only_topk_weights the chosen indices and all weights but the last, which is what is left of 1.

Source: Li et al. 2024 (arXiv 2405.15179).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import VBLoRAConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at
from lorakit.adapters.methods.options import check_config, flag, rank
from lorakit.adapters.methods.parts import check_items, check_shape, module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, ShapeMismatchError

_BANK = "base_model.vblora_vector_bank"
_LOGITS = {"a": "vblora_logits_A", "b": "vblora_logits_B"}
_ROUNDING = 1e-3
"""How far saved weights may be from a share of 1: they can be bfloat16."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a VB-LoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config, source = checkpoint.config, checkpoint.source
    numbers = [rank(name) for name in ("r", "topk", "num_vectors", "vector_length")]
    check_config(
        checkpoint,
        VBLoRAConfig,
        [*numbers, flag("save_only_topk_weights")],
        harmless="vblora_dropout init_vector_bank_bound init_logits_std",
    )
    if config["topk"] > config["num_vectors"]:
        raise CheckpointError(f"{source}: topk is {config['topk']}, more than the bank's {config['num_vectors']}.")
    grouped = parts_of(checkpoint, base, "a VB-LoRA", _items(checkpoint), (_BANK,))
    if _BANK not in grouped.shared:
        raise CheckpointError(f"{source}: the vector bank ({_BANK}) is missing; the file is incomplete.")
    bank = grouped.shared[_BANK]
    check_shape(source, "the vector bank", bank, (config["num_vectors"], config["vector_length"]))
    modules = {path: _module(checkpoint, base, path, tensors, bank) for path, tensors in grouped.modules.items()}
    return AdapterForm("vblora", modules, dict(config), grouped.kept)


def _items(checkpoint: Checkpoint) -> list[str]:
    ends = ("_topk_indices", "_topk_weights") if checkpoint.config.get("save_only_topk_weights") else ("",)
    return [logits + end for logits in _LOGITS.values() for end in ends]


def _module(
    checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor], bank: torch.Tensor
) -> ModuleForm:
    """One module's form; `items` are the ends of its keys → tensors, `bank` is (num_vectors, vector_length)."""
    source, r, length = checkpoint.source, checkpoint.config["r"], checkpoint.config["vector_length"]
    place = linear_at(checkpoint, base, path)
    if place.in_features % length or place.out_features % length:
        raise ShapeMismatchError(
            f"{source}: vector_length is {length}, which does not divide the sizes of {path}, "
            f"{place.in_features} and {place.out_features}."
        )
    check_items(checkpoint, path, items, _items(checkpoint))
    a = _vectors(checkpoint, path, items, _LOGITS["a"], (r, place.in_features // length), bank)
    b = _vectors(checkpoint, path, items, _LOGITS["b"], (place.out_features // length, r), bank)
    return module_form(place, a.reshape(r, -1), b.transpose(1, 2).reshape(-1, r))


def _vectors(
    checkpoint: Checkpoint,
    path: str,
    items: Mapping[str, torch.Tensor],
    name: str,
    shape: tuple[int, int],
    bank: torch.Tensor,
) -> torch.Tensor:
    """The mixed vectors (*shape, vector_length) of a factor, fp32."""
    k = checkpoint.config["topk"]

    def item(end: str, last: int) -> torch.Tensor:
        check_shape(checkpoint.source, f"{name}{end} of {path}", items[name + end], (*shape, last))
        return items[name + end]

    if checkpoint.config.get("save_only_topk_weights"):
        indices, weights = item("_topk_indices", k).long(), item("_topk_weights", k - 1).double()
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
        if indices.min() < 0 or indices.max() >= len(bank) or weights.min() < -_ROUNDING:
            raise CheckpointError(
                f"{checkpoint.source}: {name} of {path} has an index out of the bank or a negative weight; "
                "save the adapter again."
            )
    else:
        logits, indices = item("", len(bank)).topk(k, dim=-1)
        weights = torch.softmax(logits.double(), dim=-1)
    mixed = torch.zeros(*shape, bank.shape[1], dtype=torch.float64)
    for index, weight in zip(indices.unbind(-1), weights.unbind(-1), strict=True):
        mixed += weight[..., None] * bank[index]
    return mixed.float()
