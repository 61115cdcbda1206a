"""PEANuT: a small network that reads the base's weight and writes its update.

y = W x + b + s · B F(Wᵀ)ᵀ x, where F takes each of W's columns from out to r numbers: an activation after A, `depth`
encoders and as many decoders with skips between (peft.tuners.peanut.layer.Linear). W is frozen, so A = F(Wᵀ)ᵀ is a
constant.

Source: arXiv 2410.01870.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeanutConfig
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import Option, check_config, is_whole, number, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import UnsupportedMethodError

_DEEPEST = 256
"""More layers than any network of this kind has; the number comes from a file."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a PEANuT checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config = checkpoint.config
    act_fn = Option("act_fn", lambda value: isinstance(value, str), "an activation's name", needed=True)
    depth = Option(
        "depth",
        lambda value: is_whole(value) and value <= _DEEPEST,
        f"a whole number of at most {_DEEPEST}",
        needed=True,
    )
    check_config(checkpoint, PeanutConfig, [rank("r"), number("scaling"), act_fn, depth], harmless="init_weights")
    if any(True for _ in ACT2FN[config["act_fn"]].parameters()):
        raise UnsupportedMethodError(
            f"{checkpoint.source}: act_fn={config['act_fn']!r} has parameters of its own, which PEFT does not save; "
            "train with another activation."
        )
    layers = [f"peanut_{kind}.{i}.weight" for kind in ("encoders", "decoders") for i in range(config["depth"])]
    grouped = parts_of(checkpoint, base, "a PEANuT", ["peanut_A.weight", "peanut_B.weight", *layers])
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    return AdapterForm("peanut", modules, dict(config), grouped.kept, uses_base_weights=True)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor: A (r, out), B (out, r), and encoders and decoders (r, r).
    """
    config, place = checkpoint.config, linear_at(checkpoint, base, path)
    r, depth = config["r"], range(config["depth"])
    inner = [f"{kind}.{i}" for kind in ("encoders", "decoders") for i in depth]
    sizes = {"A": (r, place.out_features), "B": (place.out_features, r), **dict.fromkeys(inner, (r, r))}
    tensors = tensors_at(checkpoint, path, items, {f"peanut_{name}.weight": size for name, size in sizes.items()})

    def weight(name: str) -> torch.Tensor:
        return tensors[f"peanut_{name}.weight"].float()

    activation = ACT2FN[config["act_fn"]]
    skips = []
    hidden = activation(linear(base.weight(path).to("cpu", torch.float32).T, weight("A")))
    for i in depth:
        skips.append(hidden)
        hidden = activation(linear(hidden, weight(f"encoders.{i}")))
    for i in depth:
        hidden = activation(linear(hidden, weight(f"decoders.{i}"))) + skips.pop()
    return module_form(place, hidden.T, weight("B"), float(config["scaling"]))
