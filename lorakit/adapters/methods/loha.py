"""LoHa: the element-wise product of two low-rank products.

y = W x + b + s · ((w1_a w1_b) ⊙ (w2_a w2_b)) x, with s = alpha / r (peft.tuners.loha.layer.make_weight). The product
of two sums of r terms is a sum of r² terms, so B's columns are the products of w1_a's with w2_a's, and A's rows those
of w1_b's with w2_b's: rank r². Where that exceeds the module's smaller side, one factor is the identity instead.

Source: Hyeon-Woo et al. 2021, FedPara (arXiv 2108.06098).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoHaConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import factors_of, linear_at, tensors_at
from lorakit.adapters.methods.options import ALPHA_PATTERN, RANK_PATTERN, check_config, number, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.methods.targets import by_pattern
from lorakit.adapters.peft_reader import Checkpoint

_ITEMS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a LoHa checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(
        checkpoint,
        LoHaConfig,
        [rank("r"), number("alpha"), RANK_PATTERN, ALPHA_PATTERN],
        # The last concerns convolutions alone, which are no places here.
        harmless="init_weights rank_dropout module_dropout use_effective_conv2d",
    )
    grouped = parts_of(checkpoint, base, "a LoHa", _ITEMS)
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    return AdapterForm("loha", modules, dict(checkpoint.config), grouped.kept)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form."""
    place = linear_at(checkpoint, base, path)
    r = by_pattern(checkpoint, "rank_pattern", "r", path)
    scale = by_pattern(checkpoint, "alpha_pattern", "alpha", path) / r
    left, right = (place.out_features, r), (r, place.in_features)
    tensors = tensors_at(checkpoint, path, items, dict(zip(_ITEMS, (left, right, left, right), strict=True)))
    b1, a1, b2, a2 = (tensors[item] for item in _ITEMS)
    if r * r > min(place.in_features, place.out_features):
        a, b = factors_of((b1 @ a1) * (b2 @ a2))
    else:
        a = (a1[:, None] * a2[None]).flatten(0, 1)
        b = (b1[:, :, None] * b2[:, None]).flatten(1)
    return module_form(place, a.float(), b.float(), scale)
