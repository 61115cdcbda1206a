"""One linear module's adapter as PEFT's own layer, and what that layer makes of the weight and the bias.

For methods whose result has no structure to keep: a model of that module alone is given to PEFT, loaded as PEFT loads
it, and fed the unit vectors. Never more than one module of the base is in memory. Knows PEFT's models and places; knows
no method.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.methods.parts import check_items, check_shape
from lorakit.adapters.peft_reader import PREFIX, Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, LorakitError, UnsupportedMethodError

_CHUNK = 1024
"""Inputs that are fed at once."""
_LINEAR = 1e-4
"""How far the output of a linear layer may be from that of its weight, relatively, by rounding alone."""


class Weights(NamedTuple):
    """What a module of the base has.

    Attributes:
        weight: W (out, in) on the CPU, in the base's own dtype.
        bias: b (out,), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


class Change(NamedTuple):
    """What an adapter does to a module: y = (W + delta) x + b + d.

    Attributes:
        delta: (out, in), fp64.
        d: (out,), fp64, or None for zeros.
    """

    delta: torch.Tensor
    d: torch.Tensor | None


@torch.no_grad()
def change_of(
    checkpoint: Checkpoint,
    place: Place,
    path: str,
    items: Mapping[str, torch.Tensor],
    weights: Weights,
    kind: type[PeftConfig],
    options: Mapping[str, Any],
    adjust: Callable[[PeftModel, Any], None] | None = None,
) -> Change:
    """What the module's adapter does to it, by PEFT's own layer.

    Args:
        checkpoint: the checkpoint.
        place: the module's place, a linear one.
        path: its path, by which PEFT finds its options.
        items: the end of the key → tensor: all that PEFT saves of this module.
        weights: the base's.
        kind: PEFT's class of the configuration.
        options: of the configuration, in place of the checkpoint's.
        adjust: called with PEFT's model and its layer when the tensors are loaded, for what a model of one module
            cannot know of the others.

    Raises:
        CheckpointError: PEFT cannot use the configuration or the tensors here.
        ShapeMismatchError: a tensor has another shape than PEFT makes it.
        UnsupportedMethodError: PEFT has no such adapter for this module, or what it does is no change of a weight.
    """
    with _by_peft(checkpoint, path), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT corrects or draws anew; all that counts is checked here
        config = _config(checkpoint, place, path, kind, options)
        model = get_peft_model(_alone(place, path, weights), config).eval()
        layer = model.get_submodule(f"{PREFIX}{path}")
        if not isinstance(layer, BaseTunerLayer):
            raise UnsupportedMethodError(f"{checkpoint.source}: PEFT has no {checkpoint.peft_type} for {path}.")
        _load(checkpoint, path, items, model)
        if adjust is not None:
            adjust(model, layer)
        model.double()
        return _fed(checkpoint, place, path, layer, weights)


def _config(
    checkpoint: Checkpoint, place: Place, path: str, kind: type[PeftConfig], options: Mapping[str, Any]
) -> PeftConfig:
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    # Which modules are meant is known already; of the base and the task nothing is here.
    given = {
        **checkpoint.config,
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")),
        **dict.fromkeys(("task_type", "auto_mapping", "base_model_name_or_path", "revision", "runtime_config")),
        "target_modules": [path],
        "fan_in_fan_out": place.transposed,
        "inference_mode": True,
        **options,
    }
    return kind(**{key: value for key, value in given.items() if key in known})


def _alone(place: Place, path: str, weights: Weights) -> nn.Module:
    """A model that has this module alone, at its own path."""
    weight, bias = (None if each is None else nn.Parameter(each, requires_grad=False) for each in weights)
    assert weight is not None
    module: Any
    if place.transposed:
        with torch.device("meta"):
            module = Conv1D(place.out_features, place.in_features)
    else:
        module = nn.Linear(place.in_features, place.out_features, bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False) if place.transposed else weight
    module.bias = bias
    *parents, name = path.split(".")
    root = parent = nn.Module()
    for each in parents:
        parent.add_module(each, nn.Module())
        parent = parent.get_submodule(each)
    parent.add_module(name, module)
    return root


def _load(checkpoint: Checkpoint, path: str, items: Mapping[str, torch.Tensor], model: PeftModel) -> None:
    prefix = f"{PREFIX}{path}."
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}
    check_items(checkpoint, path, items, expected)
    for item, tensor in expected.items():
        check_shape(checkpoint.source, f"{item} of {path}", items[item], tuple(tensor.shape))
    set_peft_model_state_dict(model, {f"{prefix}{item}": tensor for item, tensor in items.items()})


def _fed(checkpoint: Checkpoint, place: Place, path: str, layer: nn.Module, weights: Weights) -> Change:
    """The layer's outputs for all unit vectors, less the base's."""
    width, weight = place.in_features, weights.weight.double()
    origin = layer(torch.zeros(1, width, dtype=torch.float64))
    delta = torch.empty_like(weight)
    for start in range(0, width, _CHUNK):
        units = torch.zeros(min(_CHUNK, width - start), width, dtype=torch.float64)
        units.diagonal(start).fill_(1)
        delta[:, start : start + len(units)] = (layer(units) - origin).T - weight[:, start : start + len(units)]
    probe = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = probe @ (weight + delta).T + origin
    if torch.linalg.norm(layer(probe) - expected) > _LINEAR * torch.linalg.norm(expected):
        raise UnsupportedMethodError(
            f"{checkpoint.source}: what {checkpoint.peft_type} does at {path} is no change of its weight and bias, so "
            "it has no low-rank form."
        )
    d = origin[0] if weights.bias is None else origin[0] - weights.bias.double()
    return Change(delta, d if d.any() else None)


@contextmanager
def _by_peft(checkpoint: Checkpoint, path: str) -> Iterator[None]:
    """Turns PEFT's refusals into ours."""
    try:
        yield
    except (LorakitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # untrusted values make PEFT and torch raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{checkpoint.source}: PEFT cannot use this adapter at {path}: {reason[:300]} Save the adapter again."
        ) from error
