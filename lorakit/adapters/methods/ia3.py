"""IA³: a learned scale of what a module returns, or of what it is given.

y = l ⊙ (W x + b) where the module is no feed-forward one (peft.tuners.ia3.layer.Linear): c = l, exactly. At a
feed-forward module PEFT scales the input, y = W (l ⊙ x) + b. The input of a gated MLP's last product is the product
act(gate) ⊙ up, so the scale moves to the output of `up`, as its c: exact again. Elsewhere an activation lies between,
and there is no such form.

Source: Liu et al. 2022 (arXiv 2205.05638).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import IA3Config
from peft.tuners.ia3.model import IA3Model

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.options import Option, are_names, check_config
from lorakit.adapters.methods.parts import check_shape, module_form, parts_of
from lorakit.adapters.methods.targets import PATTERN_ERRORS, place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError

_ITEM = "ia3_l"
_GATED = {"down_proj": ("up_proj", "gate_proj"), "wo": ("wi_1", "wi_0")}
"""A gated MLP's last product → the one whose output it is given times a factor, and the one behind the activation."""


_PLAIN = frozenset(
    "cohere cohere2 deepseek_v2 deepseek_v3 exaone4 gemma gemma2 gemma3 gemma3_text glm4_moe granite helium llama "
    "ministral mistral mllama mt5 olmo olmo2 olmo3 qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl "
    "seed_oss smollm3 stablelm t5 umt5".split()
)
"""Model types whose gated MLPs do nothing else between the two products: others normalise or cut off there."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts an IA³ checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    feedforward = Option("feedforward_modules", are_names, "a pattern or a list of modules' names", needed=True)
    check_config(checkpoint, IA3Config, [feedforward], harmless="init_ia3_weights")
    grouped = parts_of(checkpoint, base, "an IA³", [_ITEM])
    scales: dict[str, torch.Tensor] = {}
    for path, items in grouped.modules.items():
        place, scale = place_at(checkpoint, base, path), items[_ITEM]
        what = f"the IA³ vector of {path}"
        if _is_feedforward(checkpoint, path):
            check_shape(checkpoint.source, what, scale, (1, place.in_features))
            path = _before(checkpoint, base, path)
        else:
            check_shape(checkpoint.source, what, scale, (place.out_features, 1))
        scales[path] = scales.get(path, 1.0) * scale.flatten().float()
    modules: Mapping[str, ModuleForm] = {path: module_form(base.places[path], c=c) for path, c in scales.items()}
    return AdapterForm("ia3", modules, dict(checkpoint.config), grouped.kept)


def _is_feedforward(checkpoint: Checkpoint, path: str) -> bool:
    """As peft.IA3Model decides it."""
    try:
        return bool(IA3Model._check_target_module_feedforward(IA3Config(**_fields(checkpoint)), path))
    except PATTERN_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.source}: feedforward_modules is no regular expression ({error}); save the adapter again."
        ) from error


def _fields(checkpoint: Checkpoint) -> dict[str, object]:
    names = ("target_modules", "feedforward_modules")
    return {name: checkpoint.config.get(name) for name in names}


def _before(checkpoint: Checkpoint, base: BaseModel, path: str) -> str:
    """The module of a gated MLP whose outputs are scaled when this one's inputs are."""
    parent, _, name = path.rpartition(".")
    before, gate = (f"{parent}.{other}" for other in _GATED.get(name, ("", "")))
    if base.model_type not in _PLAIN or before not in base.places or gate not in base.places:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {path} is a feed-forward module whose input IA³ scales, and lorakit knows no exact "
            "form for it outside a plain gated MLP; train with feedforward_modules=[]."
        )
    if base.places[before].out_features != base.places[path].in_features:
        raise CheckpointError(f"{checkpoint.source}: {before} and {path} do not fit together.")
    return before
