"""TinyLoRA: a tiny trained vector, spread by fixed random matrices between the first singular vectors of W.

y = W x + b + B (Σ_i v_i P_i) A x (peft.tuners.tinylora.layer.Linear). A and B come from the SVD of W and are in the
checkpoint, so the base is not read; the random P are in it too (save_projection), or drawn again from projection_seed.
Modules in groups share a v (weight_tying); its number is their group's.

At an embedding PEFT adds its share behind what scales some models' embeddings, unlike LoRA. That is refused.

Source: Learning to Reason in 13 Parameters, 2026 (arXiv 2602.04118).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import TinyLoraConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods import seeded
from lorakit.adapters.methods.linears import tensors_at
from lorakit.adapters.methods.options import check_config, check_size, flag, number, rank
from lorakit.adapters.methods.parts import check_shape, module_form, parts_of
from lorakit.adapters.methods.targets import place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError

_VECTOR = "base_model.tinylora_v."
_A, _B, _P = "tinylora_A", "tinylora_B", "tinylora_P"


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a TinyLoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config = checkpoint.config
    check_config(
        checkpoint,
        TinyLoraConfig,
        [rank("r"), rank("u"), number("weight_tying"), flag("save_projection"), seeded.seed("projection_seed")],
        harmless="tinylora_dropout init_v_bound init_weights",
    )
    vectors = [key for key in checkpoint.tensors if key.startswith(_VECTOR)]
    grouped = parts_of(checkpoint, base, "a TinyLoRA", (_A, _B, _P), vectors)
    paths = [path for path in base.places if path in grouped.modules]
    keys = [_VECTOR + str(group) for group in _groups(len(paths), config["weight_tying"])]
    if {*keys} != grouped.shared.keys():
        raise CheckpointError(
            f"{checkpoint.source}: weight_tying and target_modules want {len({*keys})} vectors ({_VECTOR}*), but the "
            f"checkpoint has {len(vectors)}, or others; save the adapter again."
        )
    modules = {
        path: _module(checkpoint, base, path, index, grouped.modules[path], grouped.shared[key])
        for index, (path, key) in enumerate(zip(paths, keys, strict=True))
    }
    saved = bool(config.get("save_projection", True))
    return AdapterForm("tinylora", modules, dict(config), grouped.kept, uses_base_weights=not saved)


def _groups(modules: int, tying: float) -> list[int]:
    """The group of each module, as peft.TinyLoraModel._create_and_replace finds it."""
    groups = max(1, round(modules * (1.0 - tying)))
    size = max(1, modules // groups)
    return [min(index // size, groups - 1) for index in range(modules)]


def _module(
    checkpoint: Checkpoint, base: BaseModel, path: str, index: int, items: Mapping[str, torch.Tensor], v: torch.Tensor
) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        index: its number among the targeted modules.
        items: the ends of its keys → tensors.
        v: its group's vector (u,).
    """
    source, config = checkpoint.source, checkpoint.config
    place = place_at(checkpoint, base, path)
    if place.kind != "linear":
        raise UnsupportedMethodError(
            f"{source}: a TinyLoRA of the embedding {path} is not served: PEFT does not scale it as LoRA's is scaled."
        )
    r, u = min(config["r"], place.in_features, place.out_features), config["u"]
    shapes: dict[str, tuple[int, ...]] = {_A: (r, place.in_features), _B: (place.out_features, r)}
    saved = bool(config.get("save_projection", True))
    seeded.check_saved(checkpoint, "save_projection", saved, f"the random matrices of {path}", _P in items)
    tensors = tensors_at(checkpoint, path, items, shapes | ({_P: (u, r, r)} if saved else {}))
    check_shape(source, f"the vector of {path}", v, (u,))
    if saved:
        p = tensors[_P]
    else:
        check_size(checkpoint, "u", u * r * r)
        generator = torch.Generator().manual_seed(config["projection_seed"] + index)
        p = torch.normal(mean=0.0, std=1.0 / (r**0.5), size=(u, r, r), generator=generator)
        p = seeded.rounded(checkpoint, base, path, p)
    between = torch.einsum("i,ijk->jk", v.double(), p.double())
    return module_form(place, tensors[_A].float(), (tensors[_B] @ between).float())
