"""LN tuning: norms of the adapter's own."""

import pytest
import torch
from peft import LNTuningConfig
from peft_folders import edit_config, edit_tensors, key_of, save
from tenants import check_exact, form_of, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

TENANTS = {
    "norms": ("llama", LNTuningConfig()),
    "norms with a bias": ("gpt2", LNTuningConfig(target_modules=["ln_1", "ln_2", "ln_f"])),
    "norms that add one to their weight": (
        "gemma3",
        LNTuningConfig(target_modules=["input_layernorm", "q_norm", "norm"]),
    ),
    "norms and a classifier": ("bert", LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"])),
    "norms of an encoder-decoder": ("t5", LNTuningConfig()),
    "a pattern": ("opt", LNTuningConfig(target_modules=r".*layer_norm")),
    "linears and an embedding": ("llama", LNTuningConfig(target_modules=["q_proj", "embed_tokens", "norm"])),
}


@pytest.mark.parametrize("name", TENANTS)
def test_norms_are_exact(name, tmp_path):
    architecture, config = TENANTS[name]
    check_exact(tenant_with(config, architecture), tmp_path / "a", architecture)


REFUSED = {
    "a missing norm": (CheckpointError, "lacks", {}, lambda t: t.pop(key_of(t, "layers.1", "input_layernorm"))),
    "a surplus norm": (CheckpointError, "also has", {"target_modules": ["norm"]}, None),
    "a stranger": (CheckpointError, "not part of", {}, lambda t: t.update({"base_model.model.x": torch.zeros(1)})),
    "another shape": (ShapeMismatchError, "shape", {}, lambda t: t.update({key_of(t, "model.norm"): torch.zeros(33)})),
    "an unknown option": (UnsupportedMethodError, "does not know", {"scaled": True}, None),
    "no targets": (CheckpointError, "target_modules", {"target_modules": None}, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name, tmp_path):
    error, match, config, change = REFUSED[name]
    folder = save(tenant_with(LNTuningConfig()), tmp_path / "a")
    edit_config(folder, **config)
    if change:
        edit_tensors(folder, change)
    with pytest.raises(error, match=match):
        form_of(folder)
