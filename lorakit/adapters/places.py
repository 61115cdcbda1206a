"""Places: the modules of a base model that can carry an adapter, and their sizes.

The weight side asks it what a checkpoint's module must look like; the runtime asks it what it may wrap. Both see the
same places, so what exports also serves. Knows `nn.Module` classes by their shape, never a weight's value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.form import Kind


@dataclass(frozen=True)
class Place:
    """A module that can carry an adapter.

    Attributes:
        kind: "linear" (y = W x + b), "embedding" (a row of W a token) or "norm" (y = g ⊙ n(x) + b).
        in_features: input width; an embedding's number of rows.
        out_features: output width.
        transposed: the weight is stored (in, out), as transformers' Conv1D and every embedding have it.
        offset: of a norm, what is added to its weight to give g: 1 for Gemma's, 0 for most.
    """

    kind: Kind
    in_features: int
    out_features: int
    transposed: bool
    offset: float = 0.0


def place_of(module: nn.Module) -> Place | None:
    """The place that a module is, or None for a module that carries no adapter.

    Quantised linears (bitsandbytes, GPTQ, AWQ, HQQ, torchao, …) count as linear by their `in_features` and
    `out_features`: an adapter adds to what the module returns and never touches its weight.
    """
    if isinstance(module, nn.Embedding):
        return Place("embedding", module.num_embeddings, module.embedding_dim, transposed=True)
    if isinstance(module, Conv1D):
        return Place("linear", module.nx, module.nf, transposed=True)
    width, height = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # A container may report sizes too; what multiplies has tensors of its own, packed ones in buffers.
    if isinstance(width, int) and isinstance(height, int) and own_tensors(module):
        return Place("linear", width, height, transposed=False)
    return _norm_of(module)


def _norm_of(module: nn.Module) -> Place | None:
    """The place that a norm is: a module with one weight a channel, which multiplies what was normalised.

    What it does with that weight is seen by trying a copy of it, as models have norms of their own classes.
    """
    weight = getattr(module, "weight", None)
    if "Norm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    names = {name for name, _ in module.named_parameters()}
    if names - {"weight", "bias"} or isinstance(module, nn.GroupNorm | nn.modules.batchnorm._NormBase):
        return None
    offset = _offset_of(module, weight.shape[0])
    return None if offset is None else Place("norm", weight.shape[0], weight.shape[0], transposed=False, offset=offset)


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
    return {path: place for path, module in base_modules(model) if (place := place_of(module)) is not None}


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()`, with each PEFT layer given as the base layer that it wraps."""
    inner = getattr(model, "get_base_layer", None)
    if callable(inner):  # peft.tuners.tuners_utils.BaseTunerLayer
        yield prefix, inner()
        return
    yield prefix, model
    for name, child in model.named_children():
        yield from base_modules(child, f"{prefix}.{name}" if prefix else name)
