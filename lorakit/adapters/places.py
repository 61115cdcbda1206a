"""Places: the modules, and the parameters of experts, of a base model that can carry an adapter, and their sizes.

The weight side asks it what a checkpoint's module must look like; the runtime asks it what it may wrap. Both see the
same places, so what exports also serves. Knows `nn.Module` classes by their shape, never a weight's value.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.form import Kind


@dataclass(frozen=True)
class Place:
    """A module that can carry an adapter.

    Attributes:
        kind: "linear" (y = W x + b), "embedding" (a row of W a token), "norm" (y = g ⊙ n(x) + b), "experts" (a W for
            each of E experts) or "router" (y = W x + b within a module that goes on from there).
        in_features: input width; an embedding's number of rows.
        out_features: output width.
        transposed: the weight is stored (in, out), as transformers' Conv1D, every embedding and gpt-oss's experts have
            it.
        offset: of a norm, what is added to its weight to give g: 1 for Gemma's, 0 for most.
        experts: E; 1 for what is no parameter of experts.
    """

    kind: Kind
    in_features: int
    out_features: int
    transposed: bool
    offset: float = 0.0
    experts: int = 1


# What transformers' decorator `use_experts_implementation` gives a module whose forward it may exchange.
_EXPERTS = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
LAST_OF_EXPERTS = "down_proj"
"""The parameter that comes last in a module of experts, as PEFT's keys need to know."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def place_of(module: nn.Module, norms: dict[Hashable, Place | None] | None = None) -> Place | None:
    """The place that a module is, or None for a module that carries no adapter.

    Quantised linears (bitsandbytes, GPTQ, AWQ, HQQ, torchao, …) count as linear by their `in_features` and
    `out_features`: an adapter adds to what the module returns and never touches its weight.

    Args:
        module: the module.
        norms: norms that were tried before, and what they are; a model has many alike.
    """
    if isinstance(module, nn.Embedding):
        return Place("embedding", module.num_embeddings, module.embedding_dim, transposed=True)
    if isinstance(module, Conv1D):
        return Place("linear", module.nx, module.nf, transposed=True)
    width, height = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # A container may report sizes too; what multiplies has tensors of its own, packed ones in buffers.
    if isinstance(width, int) and isinstance(height, int) and own_tensors(module):
        return Place("linear", width, height, transposed=False)
    return _norm_of(module, {} if norms is None else norms)


def _norm_of(module: nn.Module, known: dict[Hashable, Place | None]) -> Place | None:
    """The place that a norm is: a module with one weight a channel, which multiplies what was normalised.

    What it does with that weight is seen by trying a copy of it, as models have norms of their own classes.
    """
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    names = {name for name, _ in module.named_parameters()}
    if names - {"weight", "bias"} or isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
        return None
    channels = weight.shape[0]
    alike = (type(module), channels, frozenset(names), _settings(module))
    if alike not in known:
        offset = _offset_of(module, channels)
        known[alike] = None if offset is None else Place("norm", channels, channels, transposed=False, offset=offset)
    return known[alike]


def _settings(module: nn.Module) -> Hashable:
    """What a norm's forward can depend on beside its weight: equal only where that is."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    plain = all(value is None or isinstance(value, bool | int | float | str | torch.dtype) for value in own.values())
    if module._modules or module._buffers or not plain:
        return id(module)
    return module.training, tuple(sorted(own.items(), key=lambda item: item[0]))


@torch.no_grad()
def _offset_of(module: nn.Module, channels: int) -> float | None:
    """What a norm adds to its weight: 0 or 1; None where its output is not such a multiple of its weight."""
    x = torch.linspace(-1, 2, 2 * channels).reshape(2, channels)
    outputs = []
    for value in (0.0, 1.0, 3.0):
        weights = {name: torch.full((channels,), value if name == "weight" else 0.0) for name in module._parameters}
        # Neither the module's hooks nor a forward that was put in its place are tried.
        trial = object.__new__(type(module))
        absent = {name: None for name, parameter in module._parameters.items() if parameter is None}
        trial.__dict__ = {**module.__dict__, "_parameters": weights | absent}
        try:
            outputs.append(type(module).forward(trial, x))
        except (TypeError, RuntimeError, ValueError):  # it needs other arguments
            return None
    zero, one, three = outputs
    step = one - zero
    if zero.shape != x.shape or not step.any() or not torch.allclose(three - zero, 3 * step, rtol=1e-4, atol=1e-5):
        return None
    return next((offset for offset in (0.0, 1.0) if torch.allclose(zero, offset * step, rtol=1e-4, atol=1e-5)), None)


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, without those of the modules inside it."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def places(model: nn.Module) -> dict[str, Place]:
    """All places of a model by module path, in the order of `named_modules()`.

    A model that PEFT has wrapped is seen as its base: a tuner layer counts as the layer it wraps, at its own path.
    """
    norms: dict[Hashable, Place | None] = {}
    found = ((path, place_of(module, norms)) for path, module in base_modules(model))
    return {path: place for path, place in found if place is not None}


def parameter_places(model: nn.Module) -> dict[str, Place]:
    """The places of a model that are parameters, by their paths, in the order of `named_parameters()`.

    They are experts' weights, and the weights of routers and other modules that are no place themselves. They stand
    apart from `places`: PEFT's target_modules never means them, and where a quantiser packs experts the base is still
    the same.
    """
    found: dict[str, Place] = {}
    for path, module in base_modules(model):
        of_module = expert_places_of(module) or _router_places_of(module)
        found |= {f"{path}.{name}": place for name, place in of_module.items()}
    return found


def expert_places_of(module: nn.Module) -> dict[str, Place]:
    """The places of a module of experts by their parameters' names: `LAST_OF_EXPERTS` and the one before it.

    Such a module has transformers' interface of experts (`transformers.integrations.use_experts_implementation`), in
    which y = Σ w · (W_down · gate(W_up x + b_up) + b_down) over the experts that the router chose; its weights are
    (E, out, in), or (E, in, out) where it says that they are transposed. Other modules, packed weights and a single
    expert, of which there is nothing to choose, give none.
    """
    if not all(hasattr(module, name) for name in _EXPERTS):
        return {}
    found = {}
    for name in ("gate_up_proj" if module.has_gate else "up_proj", LAST_OF_EXPERTS):
        weight: Any = getattr(module, name, None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 3 or weight.dtype not in _DTYPES:
            return {}
        experts, rows, columns = weight.shape
        if experts != module.num_experts or experts < 2:
            return {}
        transposed = bool(module.is_transposed)
        width, height = (rows, columns) if transposed else (columns, rows)
        found[name] = Place("experts", width, height, transposed, experts=experts)
    return found if [name for name, _ in module.named_parameters(recurse=False) if name in found] == [*found] else {}


def _router_places_of(module: nn.Module) -> dict[str, Place]:
    """The weight (out, in) of a module that may multiply by it, and then goes on, as the routers of experts do."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or place_of(module) is not None:
        return {}
    height, width = weight.shape
    return {"weight": Place("router", width, height, transposed=False)} if weight.dtype in _DTYPES else {}


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()`, with each PEFT layer given as the base layer that it wraps."""
    waiting = [(prefix, model)]
    while waiting:
        path, module = waiting.pop()
        inner = getattr(module, "get_base_layer", None)
        if callable(inner):  # peft.tuners.tuners_utils.BaseTunerLayer
            yield path, inner()
            continue
        yield path, module
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        waiting += reversed(children)
