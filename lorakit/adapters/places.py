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
        kind: "linear" (y = W x + b) or "embedding" (a row of W a token).
        in_features: input width; an embedding's number of rows.
        out_features: output width.
        transposed: the weight is stored (in, out), as transformers' Conv1D and every embedding have it.
    """

    kind: Kind
    in_features: int
    out_features: int
    transposed: bool


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
    return None


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
