"""PVeRA: VeRA that learns a distribution of its inner vector, a mean and a variance for every input.

y = W x + b + λ_b ⊙ (B_s μ) with μ the first half of λ_d ⊙ (A_s x) (peft.tuners.pvera.layer.Linear): VeRA with the
first r rows. The second half is the logarithm of the variance; it counts where PEFT samples, in training and with
sample_at_inference, which has no fixed form and is refused.

Source: PVeRA (arXiv 2512.07703); peft.PveraConfig.
"""

from __future__ import annotations

from peft import PveraConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import vera
from lorakit.adapters.peft_reader import Checkpoint

_PVERA = vera.Kind(
    "a PVeRA",
    "pvera",
    PveraConfig,
    2,
    "generator_seed",
    {"sample_at_inference": "its output is drawn anew at every call, so it has no fixed form"},
)


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a PVeRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    return vera.convert_as(_PVERA, checkpoint, base)
