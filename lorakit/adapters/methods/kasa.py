"""KaSA: LoRA with a trained diagonal between its factors, over a base without its smallest singular values.

y = (W − Ud Σd Vd) x + b + s · B diag(δ) A x, where Ud Σd Vd are the r smallest singular triplets of W
(peft.tuners.lora.variants.KasaLinearVariant). In canonical form, of rank 2r and with s inside of B:
A' = [diag(δ) A; Vd], B' = [s · B, −Ud Σd].

Source: Wang et al. 2024 (arXiv 2412.06071).
"""

from __future__ import annotations

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.methods.changed_base import weight_of
from lorakit.adapters.methods.options import is_number, maps_to
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import UnsupportedMethodError

DIAGONAL = "lora_diag"

WANTED = "a mapping of the numbers beta and gamma, which only training reads"


def fits(value: object) -> bool:
    """A configuration of kasa_config that can be meant; a field of a newer PEFT may change the mathematics."""
    return maps_to(value, is_number) and set(value) <= {"beta", "gamma"}  # type: ignore[call-overload]


def is_kasa(checkpoint: Checkpoint) -> bool:
    """An empty configuration is one too: PEFT then takes its defaults."""
    return checkpoint.config.get("kasa_config") is not None


def factors(
    checkpoint: Checkpoint,
    base: BaseModel,
    path: str,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    diagonal: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B over the base as it is, to be multiplied by nothing more.

    Args:
        checkpoint: the checkpoint.
        base: gives W of the module.
        path: the module's path.
        a: A (r, in).
        b: B (out, r).
        scale: s.
        diagonal: δ (r,).

    Returns:
        A (2r, in) and B (out, 2r), in fp32.
    """
    rank = len(a)
    # One direction has to stay.
    weight = weight_of(checkpoint, base, path, "KaSA", rank + 1)
    if base.places[path].transposed:
        raise UnsupportedMethodError(f"{checkpoint.source}: PEFT has no KaSA for {path}, whose weight is transposed.")
    # In fp32 as PEFT has it: close singular values make another precision choose other directions.
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    a = torch.cat([diagonal.float()[:, None] * a.float(), right[-rank:]])
    b = torch.cat([scale * b.float(), -left[:, -rank:] * values[-rank:]], dim=1)
    return a, b
