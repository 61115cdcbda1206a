"""PEFT checkpoints in folders, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, METHODS, adapt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]


@cache
def base_of(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny base; not to be changed."""
    return ARCHITECTURES[name].build(dtype)


def tenant_of(method: str = "lora", name: str = "llama", seed: int = 0, **options: Any) -> PeftModel:
    """A fresh adapter on a copy of the base."""
    return adapt(base_of(name), seed, **{**METHODS[method](ARCHITECTURES[name]), **options})


def small(seed: int = 0, **options: Any) -> PeftModel:
    """An adapter on two modules of each layer, quick to make."""
    return adapt(base_of(), seed, **{"target_modules": ["q_proj", "down_proj"], **options})


def save(tenant: PeftModel, folder: Path, **options: Any) -> Path:
    """As PEFT saves it; gives the folder."""
    tenant.save_pretrained(folder, **{"save_embedding_layers": False, **options})
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes fields of adapter_config.json; `...` takes one away."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors in place, in a dictionary of them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def key_of(tensors: Tensors, *parts: str) -> str:
    """The first key that holds all of these."""
    return next(key for key in sorted(tensors) if all(part in key for part in parts))


def without(*parts: str) -> Callable[[Tensors], Any]:
    """A change that takes the first tensor away whose key holds all of these."""
    return lambda tensors: tensors.pop(key_of(tensors, *parts))


def replacing(tensor: torch.Tensor, *parts: str) -> Callable[[Tensors], Any]:
    """A change that puts a tensor in the place of the first whose key holds all of these."""
    return lambda tensors: tensors.update({key_of(tensors, *parts): tensor})


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: path → bytes (a folder's are empty)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
