"""BEFT checkpoints → canonical form."""

import pytest
import torch
from peft import BeftConfig
from peft_folders import edit_config, edit_tensors, key_of, save
from tenants import check_exact, form_of, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["v_proj", "down_proj"]),
        ("llama-tied", ["v_proj"]),
        ("opt", ["v_proj", "fc1"]),
        ("bert", ["value", "classifier"]),
        ("t5", ["v"]),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets):
    form = check_exact(tenant_with(BeftConfig(target_modules=targets), name), tmp_path / "tenant", name)
    assert form.method == "beft" and form.rank == 0 and not form.uses_base_weights


def _folder(tmp_path):
    return save(tenant_with(BeftConfig(target_modules=["v_proj"])), tmp_path / "tenant")


@pytest.mark.parametrize("option", [{"modules_to_save": ["lm_head"]}, {"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    folder = _folder(tmp_path)
    edit_config(folder, **option)
    with pytest.raises(UnsupportedMethodError, match=next(iter(option))):
        form_of(folder)


def test_another_shape_is_refused(tmp_path):
    folder = _folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({key_of(tensors, "beft"): tensors[key_of(tensors, "beft")].T}))
    with pytest.raises(ShapeMismatchError, match="v_proj"):
        form_of(folder)


def test_a_missing_module_is_named(tmp_path):
    folder = _folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop(key_of(tensors, "layers.1")))
    with pytest.raises(CheckpointError, match=r"layers\.1.*v_proj"):
        form_of(folder)


def test_an_embedding_is_refused(tmp_path):
    folder = _folder(tmp_path)
    edit_config(folder, target_modules=["embed_tokens"])

    def move(tensors):
        tensors.clear()
        tensors["base_model.model.model.embed_tokens.beft_bias"] = torch.ones(1, 32)

    edit_tensors(folder, move)
    with pytest.raises(ShapeMismatchError, match="embed_tokens"):
        form_of(folder)
