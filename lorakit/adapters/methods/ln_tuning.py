"""LN tuning: norms of the adapter's own.

PEFT puts a trained copy in the place of each module that is targeted (peft.tuners.ln_tuning.LNTuningLayer), as it does
with saved modules, so `whole.py` has the formula.

Source: Zhao et al. 2023 (arXiv 2312.11420).
"""

from __future__ import annotations

from peft import LNTuningConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods.options import check_config
from lorakit.adapters.methods.parts import parameter_of
from lorakit.adapters.methods.targets import matches
from lorakit.adapters.methods.whole import Apart, above, put_back
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError

_COPY = ".ln_tuning_layers."


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts an LN tuning checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(checkpoint, LNTuningConfig, [])
    keys = {parameter_of(key): key for key in checkpoint.tensors if _COPY in key}
    strangers = checkpoint.tensors.keys() - keys.values()
    if strangers:
        raise CheckpointError(
            f"{checkpoint.source}: the key {min(strangers)!r} is not part of an LN_TUNING checkpoint; save it again."
        )
    paths = {path for name in base.parameters for path in above(name)}
    targets = matches(checkpoint, paths, checkpoint.config["target_modules"])
    wanted = {name for name in base.parameters if not targets.isdisjoint(above(name))}
    for names, fault in ((wanted - keys.keys(), "lacks"), (keys.keys() - wanted, "also has")):
        if names:
            raise CheckpointError(
                f"{checkpoint.source}: target_modules and the base say otherwise: the checkpoint {fault} "
                f"{min(names)!r}; save the adapter again, or give the base that it was trained on."
            )
    tensors = {name: checkpoint.tensors[key].to("cpu") for name, key in keys.items()}
    form = AdapterForm("ln_tuning", {}, dict(checkpoint.config))
    return put_back(form, Apart(checkpoint, base, tensors, keys, {}), checkpoint, base)
