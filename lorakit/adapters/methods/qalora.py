"""QA-LoRA: LoRA whose A sees the inputs averaged over groups.

y = W x + b + s · B A (pooled · (in / g)), where pooled are the means of groups of g inputs
(peft.tuners.lora.variants.QALoraLinearVariant). Unpooled, A has each column g times, and the scale is s · (in / g) / g.
PEFT does this on GPTQ's layers only; on others it takes use_qalora for a plain LoRA, whose A has its full width.

Source: Xu et al. 2023 (arXiv 2309.14717).
"""

from __future__ import annotations

import torch

from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import UnsupportedMethodError


def group_size(checkpoint: Checkpoint, a: torch.Tensor, in_features: int) -> int:
    """How many inputs A's columns stand for: 1 for a plain LoRA.

    Raises:
        UnsupportedMethodError: groups of one input, where the file does not say which of the two it is.
    """
    if not checkpoint.config.get("use_qalora"):
        return 1
    size = checkpoint.config.get("qalora_group_size")
    size = 16 if size is None else size
    if in_features % size:
        return 1
    if size == 1:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: use_qalora with qalora_group_size=1 is not served: the checkpoint does not say "
            "whether PEFT scaled by the inputs' number, as it does on GPTQ's layers only."
        )
    return size if a.dim() == 2 and a.shape[1] == in_features // size else 1


def unpool(a: torch.Tensor, size: int) -> torch.Tensor:
    """A over the single inputs."""
    # A copy that repeats nothing is not cheap: it would take most of an export's time.
    return a if size == 1 else a.repeat_interleave(size, dim=1)


def scale_of(in_features: int, size: int) -> float:
    """What the scale is multiplied by."""
    return 1.0 if size == 1 else in_features / size / size
