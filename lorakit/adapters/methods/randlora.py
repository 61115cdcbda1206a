"""RandLoRA's projections, which all modules share, for a layer of PEFT's that stands alone.

A (r, 1, n) and B (m, ⌈n/r⌉, r) are as large as the largest of the modules needs, n ≤ m its smaller and its larger side;
a module uses their first parts. The checkpoint holds them once for all, and again under each module.

Source: Albert et al. 2025 (arXiv 2502.00987); peft.tuners.randlora.model.RandLoraModel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lorakit.adapters.methods.parts import check_shape
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError

ITEMS = ("randlora_A", "randlora_B")
SHARED = tuple(f"base_model.{item}" for item in ITEMS)


def put_projections(
    checkpoint: Checkpoint,
    places: Collection[Place],
    items: Mapping[str, torch.Tensor],
    shared: Mapping[str, torch.Tensor],
    layer: Any,
) -> None:
    """Gives a layer the projections that were trained with.

    Args:
        checkpoint: the checkpoint.
        places: all places that it adapts.
        items: the end of the key → tensor, of the layer's module.
        shared: the checkpoint's tensors that belong to no module.
        layer: PEFT's.

    Raises:
        CheckpointError: they are missing, of other sizes, or others than the module's own copies.
    """
    r = checkpoint.config["r"]
    n, m = sorted((max(place.in_features for place in places), max(place.out_features for place in places)))
    for item, key, shape in zip(ITEMS, SHARED, ((r, 1, n), (m, -(-n // r), r)), strict=True):
        if key not in shared:
            raise CheckpointError(f"{checkpoint.source}: there is no {key}; the file is incomplete.")
        check_shape(checkpoint.source, key, shared[key], shape)
        if item in items and not torch.equal(items[item], shared[key]):
            raise CheckpointError(f"{checkpoint.source}: a module's {item} differs from {key}; save the adapter again.")
        getattr(layer, item)["default"] = shared[key].float()
