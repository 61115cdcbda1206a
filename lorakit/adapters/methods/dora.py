"""DoRA: the channel scale that LoRA's factors get when their magnitude is trained apart.

y = c ⊙ (W x + s · B A x) + b with c = m / ‖W + s · B A‖, the norm over each output's row
(peft.tuners.lora.dora.DoraLinearLayer; for an embedding over the vocabulary, DoraEmbeddingLayer). In the canonical
form, where the base's bias sits inside: d = (1 − c) ⊙ b.

Source: Liu et al. 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import torch

from lorakit.adapters.base import BaseModel

MAGNITUDE = "lora_magnitude_vector"


def channel_scale(
    base: BaseModel, path: str, a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """c and d of one module.

    Args:
        base: gives W and b of the module.
        path: the module's path.
        a: A (r, in). For an embedding, in is the vocabulary.
        b: B (out, r).
        scale: s.
        magnitude: m (out,).

    Returns:
        c (out,) fp32, and d (out,) fp32 or None where the base has no bias.
    """
    weight = base.weight(path).to("cpu", torch.float32)
    norm = torch.linalg.vector_norm(weight + scale * (b.float() @ a.float()), dim=1)
    c = magnitude.float() / norm
    bias = base.bias(path)
    return c, None if bias is None else (1 - c) * bias.to("cpu", torch.float32)
