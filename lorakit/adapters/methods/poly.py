"""Poly (Polytropon, and with splits its multi-head routing MHR): a task's mixture of skills, each a LoRA.

y = W x + b + B A x / r (peft.tuners.poly.layer.Linear). For a task, split q's share of the inputs and of the outputs
has its own weights over the skills, w_q = σ(z_q) / (Σ σ(z_q) + 1e-12) with the router's logits z
(peft.tuners.poly.router.PolyRouter); A[:, split q] = Σ_s w_qs A_qsᵀ and B[split q, :] = Σ_s w_qs B_qsᵀ. The task is
an input of PEFT's forward; a form is of one task, which the user chooses where there are several.

Sources: Ponti et al. 2022 (arXiv 2202.13914); Caccia et al. 2022, MHR (arXiv 2211.03831).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PolyConfig
from peft.tuners.poly.router import EPS

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import tensors_at
from lorakit.adapters.methods.options import Option, check_config, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.methods.targets import place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, ConfigError, UnsupportedMethodError

CHOICES = ("task_id",)

_A, _B, _LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_OPTIONS = (
    rank("r"),
    rank("n_tasks"),
    rank("n_skills"),
    rank("n_splits"),
    Option("poly_type", lambda value: value == "poly", "'poly'"),
)


def convert(checkpoint: Checkpoint, base: BaseModel, task_id: int | None = None) -> AdapterForm:
    """Converts a Poly checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(checkpoint, PolyConfig, _OPTIONS, harmless="init_weights")
    task = _task(checkpoint, task_id)
    grouped = parts_of(checkpoint, base, "a Poly", (_A, _B, _LOGITS))
    modules = {path: _module(checkpoint, base, path, items, task) for path, items in grouped.modules.items()}
    several = checkpoint.config["n_tasks"] > 1
    return AdapterForm("poly", modules, dict(checkpoint.config), grouped.kept, task_id=task if several else None)


def _task(checkpoint: Checkpoint, task_id: int | None) -> int:
    """The task that is meant.

    Raises:
        UnsupportedMethodError: there are several, and none is chosen.
        ConfigError: there is no such task.
    """
    tasks: int = checkpoint.config["n_tasks"]
    if task_id is None and tasks > 1:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: this POLY has {tasks} tasks, each with its own mixture of the skills; choose one by "
            f"its task_id, 0 to {tasks - 1} (`task_ids` or `--task-id` of an export)."
        )
    if task_id is not None and task_id >= tasks:
        known = f"{tasks} tasks, 0 to {tasks - 1}" if tasks > 1 else "1 task, 0"
        raise ConfigError(f"{checkpoint.source}: task_id={task_id} was chosen, but this POLY has {known}.")
    return task_id or 0


def _module(
    checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor], task: int
) -> ModuleForm:
    source, config, place = checkpoint.source, checkpoint.config, place_at(checkpoint, base, path)
    if place.transposed:
        raise UnsupportedMethodError(f"{source}: PEFT has no POLY for {path}, which is no nn.Linear.")
    r, skills, splits = config["r"], config["n_skills"], config["n_splits"]
    if place.in_features % splits or place.out_features % splits:
        raise CheckpointError(f"{source}: n_splits={splits} does not divide the inputs and outputs of {path}.")
    shapes = {
        _A: (splits, skills, place.in_features // splits, r),
        _B: (splits, skills, r, place.out_features // splits),
        _LOGITS: (config["n_tasks"], splits * skills),
    }
    tensors = tensors_at(checkpoint, path, items, shapes)

    gates = torch.sigmoid(tensors[_LOGITS][task]).view(splits, skills)
    weights = gates / (gates.sum(dim=-1, keepdim=True) + EPS)
    a = torch.einsum("qs,qsdr->rqd", weights, tensors[_A]).reshape(r, -1)
    b = torch.einsum("qs,qsrd->qdr", weights, tensors[_B]).reshape(-1, r)
    return module_form(place, a.float(), b.float(), 1 / r)
