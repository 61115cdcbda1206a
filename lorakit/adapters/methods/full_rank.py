"""Methods whose change of a weight has full rank, or nearly: refused, or approximated by SVD where that is asked for.

What a method computes is PEFT's own layer's (peft_layer.py), BOFT's excepted (boft.py); what is kept of it, svd.py
says. Each module is converted alone. What modules share in PEFT is taken from the checkpoint (RandLoRA's projections,
FRoD's V and S), and where that is not saved, the checkpoint is refused: PEFT makes it again from the machine's dtypes
or from the weights of many modules. Indices drawn from a seed (FourierFT, WaveFT) are drawn for each module alone.

Sources: Albert et al. 2025, RandLoRA (arXiv 2502.00987); Gao et al. 2024, FourierFT (arXiv 2405.03003); Bilican et al.
2025, WaveFT (arXiv 2505.12532); Chen et al. 2024, C3A (arXiv 2407.19342); Huang et al. 2025, HiRA (ICLR 2025); Bhardwaj
et al. 2024, SHiRA (arXiv 2406.13175); Qiu et al. 2023, OFT (arXiv 2306.07280); Liao and Monz 2024, RoAd
(arXiv 2409.00119); Nayak et al. 2025, OSF (arXiv 2504.07097); peft.tuners of these names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import boft, frod, randlora
from lorakit.adapters.methods.full_rank_options import METHODS, Method
from lorakit.adapters.methods.options import check_config, check_size
from lorakit.adapters.methods.parts import check_indices, module_form, parts_of
from lorakit.adapters.methods.peft_layer import Change, Weights, change_of
from lorakit.adapters.methods.svd import refusal, truncated
from lorakit.adapters.methods.targets import by_pattern, place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import NonFiniteWeightsError, UnsupportedMethodError

CHOICES = ("svd_energy",)

_WHY = "its change of a weight has full rank, or nearly, so it has no exact low-rank form"
_UNSAVED = {
    "RANDLORA": ("save_projection", "PEFT draws its projections in a dtype that the machine decides"),
    "FROD": ("save_projection", "PEFT makes its projections from the weights of many modules together"),
    "SUPERTUNING": ("save_precomputed_indices", "which of equally large weights are picked, the machine decides"),
}
"""PEFT type → the option without which a checkpoint is not whole, and why."""

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "RANDLORA": {"save_projection": False},
    "FROD": {"save_projection": False, "progressbar": False},
    "SHIRA": {"mask_type": "random", "random_seed": 0},
}
"""PEFT type → options under which a layer can be made alone; what they stand for is then put in from the checkpoint."""


def convert(checkpoint: Checkpoint, base: BaseModel, svd_energy: float | None = None) -> AdapterForm:
    """Converts a checkpoint by SVD; see `lorakit.adapters.methods.convert` for the errors."""
    name = checkpoint.peft_type
    if svd_energy is None:
        raise refusal(checkpoint, f"PEFT's {name} is not served exactly: {_WHY}")
    return approximated(checkpoint, base, METHODS[name], svd_energy)


def approximated(checkpoint: Checkpoint, base: BaseModel, method: Method, svd_energy: float) -> AdapterForm:
    """The form in which each module keeps this share of its change's energy.

    Args:
        checkpoint: the checkpoint.
        base: the base model.
        method: how the checkpoint is read.
        svd_energy: the share, above 0 and at most 1.
    """
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(checkpoint.peft_type)
    if kind is None:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: the PEFT that is installed has no {checkpoint.peft_type}; upgrade it."
        )
    check_config(checkpoint, kind, method.options, harmless=method.harmless)
    _check_saved(checkpoint)
    shared = [key for key in checkpoint.tensors if key in randlora.SHARED or key.startswith(frod.PREFIXES)]
    parts = parts_of(checkpoint, base, f"PEFT's {checkpoint.peft_type}", method.items, shared)
    _check_finite(checkpoint)
    places = {path: _place(checkpoint, base, path, method) for path in parts.modules}
    modules, errors = {}, {}
    for path, place in places.items():
        if method.size and checkpoint.config.get(method.size) is not None:
            r = by_pattern(checkpoint, method.sizes, method.size, path)
            check_size(checkpoint, method.size, r * (place.in_features + place.out_features))
        weights = _weights(checkpoint, base, path, method)
        module = _Module(checkpoint, path, place, parts.modules[path], weights, parts.shared, places.values())
        change = _change(module, kind)
        a, b, errors[path] = truncated(checkpoint, path, change.delta, svd_energy)
        modules[path] = module_form(place, a, b, d=change.d)
    return AdapterForm(
        checkpoint.peft_type.lower(),
        modules,
        dict(checkpoint.config),
        parts.kept,
        uses_base_weights=method.reads_base,
        svd_errors=errors,
    )


def _check_saved(checkpoint: Checkpoint) -> None:
    """Refuses what PEFT would make again in a way that one module, or another machine, cannot repeat."""
    option, reason = _UNSAVED.get(checkpoint.peft_type, ("", ""))
    if option and checkpoint.config.get(option) is False:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {option}=False is not served: {reason}; save the adapter with {option}=True."
        )


def _check_finite(checkpoint: Checkpoint) -> None:
    """Refuses NaN and Inf before matrices are solved, which then fail in words of their own."""
    for key, tensor in checkpoint.tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteWeightsError(
                f"{checkpoint.source}: {key} holds NaN or Inf. Training diverged, or the file is damaged: export an "
                "earlier checkpoint."
            )


def _place(checkpoint: Checkpoint, base: BaseModel, path: str, method: Method) -> Place:
    """The linear module at a path; refused where PEFT has no such adapter."""
    place = place_at(checkpoint, base, path)
    if place.kind == "embedding":
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {checkpoint.peft_type} is approximated at linear modules alone, and {path} is an "
            "embedding; train without it."
        )
    if place.transposed and not method.conv1d:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: PEFT has no {checkpoint.peft_type} for {path}, which is no nn.Linear."
        )
    return place


def _weights(checkpoint: Checkpoint, base: BaseModel, path: str, method: Method) -> Weights:
    """What the method's change depends on; zeros if it does not, so that nothing is read."""
    place = base.places[path]
    if not method.reads_base:
        bias = torch.zeros(place.out_features) if place.transposed else None
        return Weights(torch.zeros(place.out_features, place.in_features), bias)
    if method.needs_plain and base.stored(f"{path}.weight") is None:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {checkpoint.peft_type} takes the base's weight of {path} apart, which is quantised; "
            "train on a base that is not quantised."
        )
    weight, bias = base.weight(path).to("cpu"), base.bias(path)
    return Weights(weight, None if bias is None else bias.to("cpu"))


@dataclasses.dataclass(frozen=True, eq=False)
class _Module:
    """One module of a checkpoint.

    Attributes:
        checkpoint: the whole checkpoint.
        path: the module's path.
        place: its place.
        items: the end of the key → tensor.
        weights: the base's.
        shared: the checkpoint's tensors that belong to no module.
        places: of all modules that it adapts.
    """

    checkpoint: Checkpoint
    path: str
    place: Place
    items: Mapping[str, torch.Tensor]
    weights: Weights
    shared: Mapping[str, torch.Tensor]
    places: Collection[Place]

    def check_indices(self, item: str, indices: torch.Tensor, size: int) -> None:
        check_indices(self.checkpoint.source, f"{item} of {self.path}", indices, size)


def _change(module: _Module, kind: type[PeftConfig]) -> Change:
    """What the adapter does to a module."""
    checkpoint, name, items = module.checkpoint, module.checkpoint.peft_type, module.items
    if name == "BOFT":
        return Change(boft.delta(checkpoint, module.place, module.path, items, module.weights.weight), None)
    options = dict(_OPTIONS.get(name, {}))
    if name == "RANDLORA":
        items = {item: tensor for item, tensor in items.items() if item not in randlora.ITEMS}
    if name == "WAVEFT" and "waveft_spectrum" in items:
        # Where modules share a budget by their sizes, the spectrum's length is a module's part of it.
        length = items["waveft_spectrum"].numel()
        options = {"proportional_parameters": False, "n_frequency_pattern": {}, "n_frequency": length}
    adjust = partial(_ADJUSTMENTS[name], module) if name in _ADJUSTMENTS else None
    return change_of(checkpoint, module.place, module.path, items, module.weights, kind, options, adjust)


def _adjust_randlora(module: _Module, model: Any, layer: Any) -> None:
    randlora.put_projections(module.checkpoint, module.places, module.items, module.shared, layer)


def _adjust_frod(module: _Module, model: Any, layer: Any) -> None:
    role = next(iter(model.base_model.frod_V))
    frod.put_decomposition(module.checkpoint, role, module.shared, module.weights.weight, layer)


def _adjust_shira(module: _Module, model: Any, layer: Any) -> None:
    sizes = (module.place.out_features, module.place.in_features)
    for indices, size in zip(module.items["shira_indices"], sizes, strict=True):
        module.check_indices("shira_indices", indices, size)


def _adjust_supertuning(module: _Module, model: Any, layer: Any) -> None:
    size = module.place.out_features * module.place.in_features
    module.check_indices("supertuning_indices", module.items["supertuning_indices"], size)


_ADJUSTMENTS: Mapping[str, Callable[[_Module, Any, Any], None]] = {
    "FROD": _adjust_frod,
    "RANDLORA": _adjust_randlora,
    "SHIRA": _adjust_shira,
    "SUPERTUNING": _adjust_supertuning,
}
"""PEFT type → what is done with PEFT's model and its layer once they are loaded."""
