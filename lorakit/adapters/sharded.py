"""Weights of which every process has a part (torch's DTensor): whole again, or single values of them.

The parts come from all processes of the weight's mesh, so all of them have to ask, and in the same order. Knows
tensors; no model and no adapter.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import distributed

if distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def is_sharded(tensor: torch.Tensor | None) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor: its shape is that of the whole, and each process has a part of it or a copy."""
    return distributed.is_available() and isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on this process's device; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    gathered: torch.Tensor = tensor.full_tensor()
    return gathered


def shared_dim(tensor: torch.Tensor) -> int | None:
    """The dimension along which the processes share a tensor out; None where each has all of it.

    Raises:
        ValueError: it is shared out in another way than along one dimension.
    """
    if not is_sharded(tensor) or all(isinstance(placement, Replicate) for placement in tensor.placements):
        return None
    if len(tensor.placements) != 1 or not hasattr(tensor.placements[0], "dim"):
        raise ValueError(f"whose weight is shared out as {tensor.placements}")
    dim: int = tensor.placements[0].dim % tensor.dim()
    return dim


def own_places(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The places along `shared_dim` that this process has, ascending: (n,) int64 on the tensor's device."""
    assert is_sharded(tensor)
    shape = [1] * tensor.dim()
    shape[dim] = -1
    every = torch.arange(tensor.shape[dim], device=tensor.device).view(shape)
    # No values are sent: each process has them all, and takes its own.
    shared = distribute_tensor(every, tensor.device_mesh, tensor.placements, src_data_rank=None)
    local: torch.Tensor = shared.to_local().flatten()
    return local


def picked(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Some of a tensor's values, without gathering it.

    Args:
        tensor: of any shape.
        index: (k,) int64, the values' places in the flattened whole.

    Returns:
        (k,) on the tensor's device, in its dtype.
    """
    index = index.to(tensor.device)
    if not is_sharded(tensor):
        return tensor.detach().reshape(-1)[index]
    dim, local = shared_dim(tensor), tensor.detach().to_local()
    if dim is None:
        return local.reshape(-1)[index]
    places = list(torch.unravel_index(index, tuple(tensor.shape)))
    own = own_places(tensor, dim)
    found = torch.searchsorted(own, places[dim].contiguous()).clamp(max=max(0, len(own) - 1))
    here = own[found] == places[dim] if len(own) else torch.zeros_like(index, dtype=torch.bool)
    places[dim] = found
    values = torch.zeros(len(index), dtype=torch.float64, device=tensor.device)
    values[here] = local[tuple(place[here] for place in places)].double()
    # Each value is one process's, and zero in all others: the sum is exact.
    distributed.all_reduce(values, group=tensor.device_mesh.get_group())
    return values.to(tensor.dtype)
