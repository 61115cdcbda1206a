"""BEFT: a bias of the adapter's own.

y = W x + b + v (peft.tuners.beft.layer.Linear), so d = v, exactly; it works where the base has no bias too.

Source: arXiv 2509.15974.
"""

from __future__ import annotations

from peft import BeftConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods.linears import linear_at
from lorakit.adapters.methods.options import check_config
from lorakit.adapters.methods.parts import check_shape, module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint

_ITEM = "beft_bias"


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a BEFT checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(checkpoint, BeftConfig, [], harmless="init_weights")
    grouped = parts_of(checkpoint, base, "a BEFT", [_ITEM])
    modules = {}
    for path, items in grouped.modules.items():
        place, bias = linear_at(checkpoint, base, path), items[_ITEM]
        check_shape(checkpoint.source, f"the BEFT bias of {path}", bias, (1, place.out_features))
        modules[path] = module_form(place, d=bias.flatten())
    return AdapterForm("beft", modules, dict(checkpoint.config), grouped.kept)
