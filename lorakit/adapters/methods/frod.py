"""FRoD's decomposition, which the modules of one role share, for a layer of PEFT's that stands alone.

y = U (S + Λ) Vᵀ x + b: V (in, in) comes from the weights of all modules of a role together, U from V and the module's
own weight W = U Λ₀ Vᵀ, and the places of the sparse S from a seed. V and S's places are in the checkpoint; U is not.

Source: peft.tuners.frod.layer.FrodLayer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorakit.adapters.methods.parts import check_indices, check_shape
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError

PREFIXES = tuple(f"base_model.frod_{name}." for name in ("V", "s_indices", "s_size"))


def put_decomposition(
    checkpoint: Checkpoint, role: str, shared: Mapping[str, torch.Tensor], weight: torch.Tensor, layer: Any
) -> None:
    """Gives a layer the decomposition that was trained with.

    Args:
        checkpoint: the checkpoint.
        role: PEFT's name for what the modules that share have in common.
        shared: the checkpoint's tensors that belong to no module.
        weight: W (out, in) of the base.
        layer: PEFT's.

    Raises:
        CheckpointError: they are missing or of other sizes.
    """
    width = weight.shape[1]
    keys = [f"{prefix}{role}" for prefix in PREFIXES]
    missing = [key for key in keys if key not in shared]
    if missing:
        raise CheckpointError(f"{checkpoint.source}: there is no {missing[0]}; the file is incomplete.")
    v, indices, size = (shared[key] for key in keys)
    check_shape(checkpoint.source, keys[0], v, (width, width))
    check_shape(checkpoint.source, keys[1], indices, tuple(layer.frod_s_indices["default"].shape))
    if not v.is_floating_point() or size.tolist() != [width, width]:
        raise CheckpointError(f"{checkpoint.source}: {keys[2]} is not {[width, width]}; save the adapter again.")
    check_indices(checkpoint.source, keys[1], indices, width)
    v = v.to(weight.dtype)
    layer.frod_V["default"], layer.frod_s_indices["default"] = v, indices.long()
    u, _ = layer._calculate_frod_u_and_lambda(v, weight)
    layer.frod_U["default"] = u.to(weight.dtype)
