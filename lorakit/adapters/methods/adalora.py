"""AdaLoRA: LoRA as a singular value decomposition, whose small values are pruned while it trains.

y = W x + b + s · B (E ⊙ A) x, with E (r, 1) the singular values and s = alpha / (init_r + 1e-5)
(peft.tuners.adalora.layer.SVDLinear). Training masks E; the file then keeps the rows that `rank_pattern` marks, and s
stays that of `init_r`. A module can lose all its rows: it then adds nothing.

AdaLoraConfig inherits LoRA's options, of which PEFT overlooks use_rslora, lora_bias and alpha_pattern for this method;
so does this file.

Source: Zhang et al. 2023 (arXiv 2303.10512).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import Option, check_config, is_flag, maps_to, number, rank, shown
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError

_ITEMS = ("lora_A", "lora_B", "lora_E")
_EPSILON = 1e-5  # PEFT's guard against a rank of zero, which it adds to every rank
_LORAS = "it is an option of LoRA that has no meaning for AdaLoRA"
_REFUSED = {
    **dict.fromkeys(
        "use_dora use_qalora use_bdlora kasa_config arrow_config alora_invocation_tokens loftq_config "
        "velora_config monteclora_config eva_config corda_config lora_ga_config".split(),
        _LORAS,
    ),
    "target_parameters": "its expert parameters need per-expert factors",
    "layer_replication": "it changes the base's layers, which all tenants share",
    "megatron_config": "its layers are Megatron's, not transformers'",
}
_OPTIONS = (
    rank("init_r"),
    number("lora_alpha"),
    Option(
        "rank_pattern",
        lambda value: maps_to(value, lambda kept: isinstance(kept, list) and all(map(is_flag, kept))),
        "a mapping from tensors' names to lists of true and false",
    ),
)


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts an AdaLoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(
        checkpoint,
        AdaLoraConfig,
        _OPTIONS,
        harmless="r lora_dropout init_lora_weights use_rslora lora_bias alpha_pattern megatron_core "
        "qalora_group_size ensure_weight_tying target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step",
        refused=_REFUSED,
    )
    # A name may have changed the base's weights when training began, as PiSSA's does for LoRA.
    init = checkpoint.config.get("init_lora_weights")
    if init is not None and not isinstance(init, bool) and init != "gaussian":
        raise UnsupportedMethodError(
            f"{checkpoint.source}: init_lora_weights={shown(init)} is not served for AdaLoRA; use true or false."
        )
    grouped = parts_of(checkpoint, base, "an AdaLoRA", _ITEMS)
    ranks = _ranks(checkpoint, grouped.modules)
    modules = {path: _module(checkpoint, base, path, items, ranks[path]) for path, items in grouped.modules.items()}
    return AdapterForm("adalora", modules, dict(checkpoint.config), grouped.kept)


def _ranks(checkpoint: Checkpoint, paths: Mapping[str, Any]) -> dict[str, int]:
    """How many rows each module has kept."""
    init: int = checkpoint.config["init_r"]
    ranks = dict.fromkeys(paths, init)
    for name, kept in (checkpoint.config.get("rank_pattern") or {}).items():
        path = name.removesuffix(".lora_E")
        if path == name or path not in ranks or len(kept) != init:
            raise CheckpointError(
                f"{checkpoint.source}: rank_pattern should say for each lora_E of the file which of its {init} rows "
                f"were kept, which it does not for {shown(name)}; save the adapter again."
            )
        ranks[path] = sum(kept)
    return ranks


def _module(
    checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor], rank: int
) -> ModuleForm:
    """One module's form."""
    place = linear_at(checkpoint, base, path)
    shapes = {"lora_A": (rank, place.in_features), "lora_B": (place.out_features, rank), "lora_E": (rank, 1)}
    tensors = tensors_at(checkpoint, path, items, shapes)
    init, alpha = checkpoint.config["init_r"], checkpoint.config["lora_alpha"]
    if alpha <= 0 and rank != init:
        # PEFT then scales by the rank: in training by the first one, after loading by what pruning left.
        raise UnsupportedMethodError(
            f"{checkpoint.source}: lora_alpha={shown(alpha)} is not served where ranks were pruned: PEFT scales such "
            "an adapter otherwise after loading than it did in training."
        )
    scale = (alpha if alpha > 0 else init) / (init + _EPSILON)
    a, b = tensors["lora_A"] * tensors["lora_E"], tensors["lora_B"]
    if rank == 0:  # A form says something of each of its modules: here a row of zeros.
        a, b = a.new_zeros(1, place.in_features), b.new_zeros(place.out_features, 1)
    return module_form(place, a.float(), b.float(), scale)
