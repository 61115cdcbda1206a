"""DeLoRA: LoRA whose terms are normalised, with one learned strength for all of them.

y = W x + b + B diag(λ / r / (‖A_i‖ ‖B_i‖)) A (n ⊙ x), the norms over A's rows and B's columns and at least 1e-4 each
(peft.tuners.delora.layer.DeloraLinear). n is the norm of each of W's columns when training began; the checkpoint has
it. So A takes n and the strengths, and B stays.

Source: Bini et al. 2025 (arXiv 2503.18225).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import DeloraConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import RANK_PATTERN, check_config, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.methods.targets import by_pattern
from lorakit.adapters.peft_reader import Checkpoint

_ITEMS = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
_SMALLEST = 1e-4  # PEFT's, of a norm


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a DeLoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(
        checkpoint,
        DeloraConfig,
        [rank("r"), RANK_PATTERN],
        # λ is trained, and so in the tensors; the configuration has what it began with.
        harmless="delora_lambda lambda_pattern init_weights module_dropout",
    )
    grouped = parts_of(checkpoint, base, "a DeLoRA", _ITEMS)
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    return AdapterForm("delora", modules, dict(checkpoint.config), grouped.kept)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form."""
    place = linear_at(checkpoint, base, path)
    r = by_pattern(checkpoint, "rank_pattern", "r", path)
    width, height = place.in_features, place.out_features
    shapes = dict(zip(_ITEMS, ((r, width), (height, r), (1,), (width,)), strict=True))
    tensors = tensors_at(checkpoint, path, items, shapes)
    a, b, strength, column_norms = (tensors[item] for item in _ITEMS)
    norms = a.norm(dim=1).clamp(min=_SMALLEST) * b.norm(dim=0).clamp(min=_SMALLEST)
    a = (strength / r / norms)[:, None] * a * column_norms
    return module_form(place, a.float(), b.float())
