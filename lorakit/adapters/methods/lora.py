"""LoRA and its plain variants: rsLoRA, rank_pattern, alpha_pattern, lora_bias; Linear, Conv1D and Embedding.

y = W x + b + s · B A x, with s = alpha / r, or alpha / √r for rsLoRA (peft.tuners.lora.LoraLayer). DoRA adds its
channel scale in dora.py. Which options are served, lora_options.py says.

Sources: Hu et al. 2021 (arXiv 2106.09685); Kalajdzievski 2023, rsLoRA (arXiv 2312.03732); peft.LoraConfig.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods import dora
from lorakit.adapters.methods.lora_options import check_options
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, ModuleNotFoundInBaseError, ShapeMismatchError

# What a key can end with, and what that is. Values are (factor, kind of place).
_FACTORS = {
    "lora_A.weight": ("a", "linear"),
    "lora_B.weight": ("b", "linear"),
    "lora_embedding_A": ("a", "embedding"),
    "lora_embedding_B": ("b", "embedding"),
}
_BIAS = "lora_B.bias"

# What compiling and matching an untrusted pattern can raise.
_PATTERN_ERRORS = (re.error, OverflowError, RecursionError)


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a LoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config = checkpoint.config
    check_options(checkpoint)
    grouped = _group(checkpoint, base)
    _check_modules(checkpoint, base, grouped)
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.items()}
    # What A and B alone cannot give back to PEFT: DoRA's magnitudes, and biases, which the form holds scaled.
    extras = {
        f"{path}.{item}": items[item]
        for path, items in grouped.items()
        for item in (dora.MAGNITUDE, _BIAS)
        if item in items
    }
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    return AdapterForm(method, modules, dict(config), extras, uses_base_weights=bool(config.get("use_dora")))


def restore(form: AdapterForm) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by key."""
    tensors = dict(form.extras)
    for path, module in form.modules.items():
        for item, (factor, kind) in _FACTORS.items():
            tensor = getattr(module, factor)
            if kind == module.kind and tensor is not None:
                transposed = kind == "embedding" and factor == "a"
                tensors[f"{path}.{item}"] = tensor.T.contiguous() if transposed else tensor
    return tensors


def _group(checkpoint: Checkpoint, base: BaseModel) -> dict[str, dict[str, torch.Tensor]]:
    """Sorts the tensors as module path → item → tensor; refuses keys of no known meaning."""
    grouped: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in checkpoint.tensors.items():
        item = next((item for item in (*_FACTORS, _BIAS, dora.MAGNITUDE) if key.endswith(f".{item}")), None)
        if item is not None:
            grouped[key.removesuffix(f".{item}")][item] = tensor
        elif not _is_base_copy(key, tensor, base):
            raise CheckpointError(
                f"{checkpoint.source}: the key {key!r} is not part of a LoRA checkpoint, "
                "and is no copy of the base's weight either."
            )
    return dict(grouped)


def _is_base_copy(key: str, tensor: torch.Tensor, base: BaseModel) -> bool:
    """PEFT writes whole embeddings beside an adapter on them; unchanged copies say nothing that the base does not."""
    weight = base.parameter(key.replace(".base_layer.", "."))
    if weight is None or weight.shape != tensor.shape:
        return False
    weight = weight.to(tensor.device)
    return torch.equal(weight.to(tensor.dtype), tensor) or torch.equal(tensor.to(weight.dtype), weight)


def _check_modules(checkpoint: Checkpoint, base: BaseModel, grouped: Mapping[str, object]) -> None:
    """Refuses weights for other modules than the configuration targets.

    PEFT would leave the modules that lack weights as the base has them, and overlook the weights of others.
    """
    if not grouped:
        raise CheckpointError(
            f"{checkpoint.source}: the checkpoint holds no lora_A and lora_B; save the adapter again."
        )
    for path in grouped:
        _place(checkpoint, base, path)
    targeted = _targeted(checkpoint, base)
    missing = [path for path in base.places if path in targeted and path not in grouped]
    if missing:
        raise CheckpointError(
            f"{checkpoint.source}: the weights lack {len(missing)} of the modules that target_modules names, "
            f"for example {missing[0]!r}; the file is incomplete, or was trained on another base."
        )
    surplus = [path for path in grouped if path not in targeted]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.source}: there are weights for {len(surplus)} modules, for example {surplus[0]!r}, that "
            "target_modules and its exceptions do not name, so PEFT would not use them; save the adapter again."
        )


def _targeted(checkpoint: Checkpoint, base: BaseModel) -> frozenset[str]:
    """The places that PEFT would adapt."""
    config = checkpoint.config
    if isinstance(config["target_modules"], str) and config["target_modules"].lower() == "all-linear":
        return base.all_linear
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    matcher = SimpleNamespace(
        modules_to_save=None, target_parameters=None, **{field: config.get(field) for field in fields}
    )
    try:
        return frozenset(path for path in base.places if check_target_module_exists(matcher, path))
    except _PATTERN_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.source}: a pattern in target_modules, exclude_modules or layers_pattern is no regular "
            f"expression ({error}); save the adapter again."
        ) from error


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor: A (r, in), B (out, r), and bias or magnitude (out).
    """
    source = checkpoint.source
    place = _place(checkpoint, base, path)
    factors = {_FACTORS[item][0]: tensor for item, tensor in items.items() if item in _FACTORS}
    kinds = {_FACTORS[item][1] for item in items if item in _FACTORS}
    if factors.keys() != {"a", "b"}:
        lacking = "A" if "a" not in factors else "B"
        raise CheckpointError(f"{source}: {path} has no LoRA {lacking}; the file is incomplete.")
    if kinds != {place.kind}:
        raise ShapeMismatchError(f"{source}: {path} is an adapter for another kind of module than its {place.kind}.")
    rank, scale = _rank_and_scale(checkpoint, path)
    expected = {"a": (rank, place.in_features), "b": (place.out_features, rank)}
    for factor, tensor in factors.items():
        _check_shape(source, f"LoRA {factor.upper()} of {path}", tensor, expected[factor])

    a, b = factors["a"], factors["b"]
    c = d = None
    if bool(checkpoint.config.get("use_dora")) != (dora.MAGNITUDE in items):
        raise CheckpointError(f"{source}: use_dora and the magnitude vector of {path} do not agree.")
    if bool(checkpoint.config.get("lora_bias")) != (_BIAS in items):
        raise CheckpointError(f"{source}: lora_bias and the bias of {path} do not agree.")
    if dora.MAGNITUDE in items:
        magnitude = items[dora.MAGNITUDE]
        _check_shape(source, f"the magnitude vector of {path}", magnitude, (place.out_features,))
        c, d = dora.channel_scale(base, path, a, b, scale, magnitude)
    if _BIAS in items:
        _check_shape(source, f"the LoRA bias of {path}", items[_BIAS], (place.out_features,))
        d = scale * items[_BIAS].float()
    if place.kind == "embedding":
        a = a.T.contiguous()
    return ModuleForm(place.kind, place.in_features, place.out_features, a, b, scale, c, d)


def _place(checkpoint: Checkpoint, base: BaseModel, path: str) -> Place:
    place = base.places.get(path)
    if place is None:
        raise ModuleNotFoundInBaseError(
            f"{checkpoint.source}: the base model {base.id or base.architecture!r} ({base.architecture}) has no "
            f"module {path!r} that can carry an adapter; was it trained on another base, or with another head?"
        )
    return place


def _rank_and_scale(checkpoint: Checkpoint, path: str) -> tuple[int, float]:
    """r and s of a module, as peft.LoraModel finds them: the first pattern that matches the path's end."""
    config = checkpoint.config
    try:
        rank: int = _by_pattern(config.get("rank_pattern"), path, config["r"])
        alpha: float = _by_pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    except _PATTERN_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.source}: a pattern in rank_pattern or alpha_pattern is no regular expression ({error}); "
            "save the adapter again."
        ) from error
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _check_shape(source: str, what: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ShapeMismatchError(
            f"{source}: {what} has shape {tuple(tensor.shape)}, but its configuration and the base want {expected}."
        )
