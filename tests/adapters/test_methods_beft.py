"""BEFT checkpoints → canonical form."""

import pytest
import torch
from peft import BeftConfig
from peft_folders import edit_config, key_of, save, without
from tenants import check_exact, check_refused, tenant_with

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


@pytest.mark.parametrize("option", [{"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


def test_another_shape_is_refused(tmp_path):
    check_refused(
        _folder(tmp_path),
        ShapeMismatchError,
        "v_proj",
        tensors=lambda tensors: tensors.update({key_of(tensors, "beft"): tensors[key_of(tensors, "beft")].T}),
    )


def test_a_missing_module_is_named(tmp_path):
    check_refused(_folder(tmp_path), CheckpointError, r"layers\.1.*v_proj", tensors=without("layers.1"))


def test_an_embedding_is_refused(tmp_path):
    folder = _folder(tmp_path)
    edit_config(folder, target_modules=["embed_tokens"])

    def move(tensors):
        tensors.clear()
        tensors["base_model.model.model.embed_tokens.beft_bias"] = torch.ones(1, 32)

    check_refused(folder, ShapeMismatchError, "embed_tokens", tensors=move)
