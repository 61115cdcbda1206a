"""PiSSA and OLoRA: LoRA whose first factors are taken out of the base's weight.

y = (W − s · B0 A0) x + b + s · B A x. PEFT makes A0 and B0 from W when training begins and again on every reload:

- PiSSA (peft.tuners.lora.LoraLayer.pissa_init): W = V Σ U by SVD, and with Σr / s for the r largest singular values,
  A0 = √(Σr / s) Ur and B0 = Vr √(Σr / s).
- OLoRA (LoraLayer.olora_init): W = Q R by QR, B0 = Q[:, :r] and A0 = R[:r]. Of a Conv1D PEFT factors the weight as it
  is stored, (in, out), so there A0 = Q[:, :r]ᵀ and B0 = R[:r]ᵀ.

In canonical form, of rank 2r: B A − B0 A0 = [B − B0, B0] [A; A − A0]. What is subtracted is small after a short
training, so that this sum loses far less in a 16-bit dtype than [B, −B0] [A; A0] would.

Sources: Meng et al. 2024, PiSSA (arXiv 2404.02948); Büyükakyüz 2024, OLoRA (arXiv 2406.01775).
"""

from __future__ import annotations

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.methods.changed_base import weight_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError


def method_of(checkpoint: Checkpoint) -> str | None:
    """The short name, or None for another initialisation; PEFT reads only OLoRA's name in any case."""
    init = checkpoint.config.get("init_lora_weights")
    if init == "pissa":
        return "pissa"
    return "olora" if isinstance(init, str) and init.lower() == "olora" else None


def factors(
    checkpoint: Checkpoint, base: BaseModel, path: str, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B over the base as it is.

    Args:
        checkpoint: the checkpoint.
        base: gives W of the module.
        path: the module's path.
        a: A (r, in).
        b: B (out, r).
        scale: s.

    Returns:
        A (2r, in) and B (out, 2r), in fp32.
    """
    rank = len(a)
    if method_of(checkpoint) == "pissa":
        weight = weight_of(checkpoint, base, path, "PiSSA", rank)
        if scale <= 0:
            raise CheckpointError(f"{checkpoint.source}: PiSSA takes a root of lora_alpha, which must be above 0.")
        first_a, first_b = _pissa(weight, rank, scale)
    else:
        weight = weight_of(checkpoint, base, path, "OLoRA", rank)
        first_a, first_b = _olora(weight, rank, base.places[path].transposed)
    a, b = a.float(), b.float()
    return torch.cat([a, a - first_a]), torch.cat([b - first_b, first_b], dim=1)


def _pissa(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0. In fp32 as PEFT has it: close singular values make another precision choose other directions."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = torch.diag(torch.sqrt(values[:rank] / scale))
    return roots @ right[:rank], left[:, :rank] @ roots


def _olora(weight: torch.Tensor, rank: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0, by the QR of the weight as it is stored."""
    q, r = torch.linalg.qr(weight.T if transposed else weight)
    return (q[:, :rank].T, r[:rank].T) if transposed else (r[:rank], q[:, :rank])
