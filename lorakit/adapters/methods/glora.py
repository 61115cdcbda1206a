"""GLoRA, where its factors of the weight are one number a channel.

y = (W + a ⊙ W + p 1ᵀ) x + b + b ⊙ D + E + W C, with a and p one number an output or one for all
(peft.tuners.glora.layer.GloraLinear; PEFT writes A and B for them). So c = 1 + a, rank-1 factors A = 1ᵀ and B = p / c,
and d = b ⊙ (D − a) + E + W C. Where the base has no bias, PEFT adds neither C nor D nor E. With config_A_B="lora" a is
a matrix, and a ⊙ W has full rank: it is refused, or approximated by SVD where that is asked for.

Source: Chavan et al. 2023 (arXiv 2306.07967).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import reduce

import torch
from peft import GloraConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.full_rank import approximated
from lorakit.adapters.methods.full_rank_options import Method
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import Option, check_config, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.methods.svd import refusal
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, UnsupportedMethodError

CHOICES = ("svd_energy",)

_KINDS = ("lora", "vector", "constant", "none")
_ENDINGS = tuple(f"glora_{path}.{ending}" for path in "ABCDE" for ending in ("X", "Xd", "Xu", "zeros"))


def convert(checkpoint: Checkpoint, base: BaseModel, svd_energy: float | None = None) -> AdapterForm:
    """Converts a GLoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config = checkpoint.config
    if config.get("config_A_B", "lora") == "lora":  # PEFT's default
        if svd_energy is not None:
            return approximated(checkpoint, base, _MATRIX, svd_energy)
        raise refusal(
            checkpoint,
            "config_A_B='lora' multiplies the base's weight by a matrix, element by element, which has no low-rank "
            "form; train with 'vector', 'constant' or 'none'",
        )
    check_config(checkpoint, GloraConfig, [rank("r"), _choice("config_A_B"), *_CHOSEN], harmless="init_weights")
    grouped = parts_of(checkpoint, base, "a GLoRA", _ENDINGS)
    modules = {}
    for path, items in grouped.modules.items():
        modules[path] = _module(checkpoint, base, path, items)
    return AdapterForm("glora", modules, dict(config), grouped.kept, uses_base_weights=True)


def _choice(name: str) -> Option:
    """Which values each may have, PEFT's own class tests."""
    return Option(name, lambda value: isinstance(value, str) and value in _KINDS, "one of PEFT's names", needed=True)


_CHOSEN = (_choice("config_C"), _choice("config_D_E"))
_MATRIX = Method(
    _ENDINGS,
    (rank("r"), dataclasses.replace(_choice("config_A_B"), needed=False), *_CHOSEN),
    "init_weights",
    reads_base=True,
    size="r",
)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor.
    """
    config, place = checkpoint.config, linear_at(checkpoint, base, path)
    bias = base.bias(path)
    kinds = dict.fromkeys("AB", config["config_A_B"]) | dict.fromkeys("CDE", "none")
    if bias is not None:  # else PEFT has nothing in the place of C, D and E
        kinds |= {"C": config["config_C"]} | dict.fromkeys("DE", config["config_D_E"])
    shapes = {letter: _shapes(letter, kind, place, config["r"]) for letter, kind in kinds.items()}
    tensors = tensors_at(
        checkpoint, path, items, {key: shape for each in shapes.values() for key, shape in each.items()}
    )
    scale, shift, coupling, factor, term = (
        _value(checkpoint, path, {item: tensors[item] for item in each}) for each in shapes.values()
    )

    c = (1 + scale).expand(place.out_features)
    a = b = d = None
    if shift.any():
        if ((c == 0) & (shift != 0)).any():
            raise UnsupportedMethodError(
                f"{checkpoint.source}: glora_A of {path} takes an output's weights away (1 + A = 0) where glora_B adds "
                "others, which has no form with a scale on the outside."
            )
        b = torch.where(c == 0, 0, shift / c)[:, None].float()
        a = torch.ones(1, place.in_features)
    if bias is not None:
        d = bias.to("cpu", torch.float64) * (factor - scale) + term
        if coupling.any():
            weight = base.weight(path).to("cpu", torch.float32)
            d = d + (weight @ coupling.expand(place.in_features).float()[:, None])[:, 0]
    return module_form(place, a, b, c=c, d=d)


def _shapes(letter: str, kind: str, place: Place, rank: int) -> dict[str, tuple[int, ...]]:
    """The end of the key → shape, of one of PEFT's five paths."""
    height, width = place.out_features, place.in_features
    size = width if letter == "C" else height
    if kind == "none":
        return {
            f"glora_{letter}.zeros": (height, width) if letter in "AB" else (width, 1) if letter == "C" else (height,)
        }
    if kind == "lora":
        return {f"glora_{letter}.Xd": (size, rank), f"glora_{letter}.Xu": (rank, 1)}
    return {f"glora_{letter}.X": (1,) if kind == "constant" else (size,) if letter in "DE" else (size, 1)}


def _value(checkpoint: Checkpoint, path: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What one of PEFT's paths computes, in fp64: one number a channel, or one for all (1,)."""
    for item, tensor in tensors.items():
        if item.endswith(".zeros"):
            if tensor.any():
                raise CheckpointError(f"{checkpoint.source}: {item} of {path} is not zero; save the adapter again.")
            return torch.zeros(1, dtype=torch.float64)
    return reduce(torch.matmul, tensors.values()).flatten()
