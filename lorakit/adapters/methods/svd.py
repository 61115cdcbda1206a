"""Changes of a weight that have no exact low-rank form → the nearest one that keeps a share of their energy.

The energy of ΔW is ‖ΔW‖²_F, the sum of its squared singular values; of all matrices of a rank the sum of the first
singular triplets is the nearest (Eckart and Young 1936). Knows matrices; knows no method, no checkpoint's keys.
"""

from __future__ import annotations

import torch

from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import NonFiniteWeightsError, UnsupportedMethodError

_ROUNDING = 1e-13
"""Less of the energy than this is noise: a relative error of 3e-7, as fp32's own rounding."""


def refusal(checkpoint: Checkpoint, reason: str) -> UnsupportedMethodError:
    """The error where a change has no exact form and nobody asked for another.

    Args:
        checkpoint: the checkpoint.
        reason: why, without a full stop.
    """
    return UnsupportedMethodError(
        f"{checkpoint.source}: {reason}; export with svd_energy=0.999 to approximate it by SVD."
    )


def truncated(
    checkpoint: Checkpoint, path: str, delta: torch.Tensor, energy: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A and B of the least rank that keeps a share of ΔW's energy.

    By the eigenvectors of ΔW ΔWᵀ, or of ΔWᵀ ΔW if that is smaller: the singular values' squares are its eigenvalues,
    and the other factor is a product with ΔW, so that nothing is lost that the kept directions hold.

    Args:
        checkpoint: the checkpoint, for messages.
        path: the module's path, for messages.
        delta: ΔW (out, in), fp64.
        energy: the share, above 0 and at most 1.

    Returns:
        A (r, in) and B (out, r) in fp32, r at least 1; and the relative error ‖ΔW − B A‖_F / ‖ΔW‖_F.

    Raises:
        NonFiniteWeightsError: ΔW holds NaN or Inf.
    """
    if not delta.isfinite().all():
        raise NonFiniteWeightsError(
            f"{checkpoint.source}: the change of the weight at {path} holds NaN or Inf. "
            "Training diverged, or the file is damaged: export an earlier checkpoint."
        )
    wide = delta.shape[0] <= delta.shape[1]
    values, vectors = torch.linalg.eigh(delta @ delta.T if wide else delta.T @ delta)  # ascending
    kept = values.flip(0).clamp(min=0).cumsum(0)
    rank = min(int((kept < energy * (1 - _ROUNDING) * kept[-1]).sum()) + 1, len(kept))
    basis = vectors.flip(1)[:, :rank]
    a, b = (basis.T @ delta, basis) if wide else (basis.T, delta @ basis)
    a, b = a.float(), b.float()
    norm = torch.linalg.norm(delta).item()
    return a, b, torch.linalg.norm(delta - b.double() @ a.double()).item() / norm if norm else 0.0
