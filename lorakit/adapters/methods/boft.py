"""BOFT's rotation of a weight, written out: PEFT's layer has several factors only where it can build its CUDA code.

y = s ⊙ (W Mᵀ x) + b with M = M_k … M_1 (peft.tuners.boft.layer.Linear). M_i = P_i D_i P_iᵀ: D_i is block-diagonal, its
blocks (I − S)(I + S)⁻¹ of skew-symmetric S = (R − Rᵀ) / 2, and P_i the butterfly's i-th permutation. PEFT trains one
factor alone, whatever its configuration says, where it cannot build that code; the checkpoint shows which was trained.

Source: Liu et al. 2023 (arXiv 2311.06243).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.boft.layer import BOFTLayer

from lorakit.adapters.methods.linears import tensors_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError

_R, _S = "boft_R", "boft_s"


def delta(
    checkpoint: Checkpoint, place: Place, path: str, items: Mapping[str, torch.Tensor], weight: torch.Tensor
) -> torch.Tensor:
    """W_eff − W (out, in) in fp64.

    Args:
        checkpoint: the checkpoint.
        place: the module's place.
        path: its path.
        items: the end of the key → tensor: R (factors, blocks, size, size) and s (out, 1).
        weight: W (out, in).

    Raises:
        CheckpointError: tensors are missing, or the options do not divide the inputs.
        ShapeMismatchError: a tensor has another shape.
    """
    config, width = checkpoint.config, place.in_features
    size = config.get("boft_block_size") or 0
    blocks = config.get("boft_block_num") or 0
    size, blocks = (size, width // size) if size else (width // blocks, blocks)
    factors = 1 if _R in items and items[_R].shape[:1] == (1,) else config["boft_n_butterfly_factor"]
    several = factors > 1 and (size % 2 or factors > 31 or blocks % (1 << (factors - 1)))
    if not size or size * blocks != width or several:
        raise CheckpointError(
            f"{checkpoint.source}: boft_block_size={config.get('boft_block_size')}, "
            f"boft_block_num={config.get('boft_block_num')} and boft_n_butterfly_factor={factors} do not fit the "
            f"{width} inputs of {path}."
        )
    shapes = {_R: (factors, blocks, size, size), _S: (place.out_features, 1)}
    tensors = tensors_at(checkpoint, path, items, shapes)
    eye = torch.eye(size, dtype=torch.float64)
    skew = (tensors[_R] - tensors[_R].transpose(-2, -1)) / 2
    rotations = torch.linalg.solve(eye + skew, eye - skew, left=False)
    rotated = weight.double()
    for i, factor in enumerate(rotations):
        # PEFT's method uses nothing of its layer.
        order = BOFTLayer.block_butterfly_perm(None, width, blocks >> i, size // 2, factors - 1)
        rotated = rotated @ torch.block_diag(*factor)[order][:, order].T
    return tensors[_S] * rotated - weight.double()
