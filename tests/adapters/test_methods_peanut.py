"""PEANuT checkpoints → canonical form."""

import pytest
import torch
from peft import PeanutConfig
from peft_folders import replacing, save, without
from tenants import check_exact, check_refused, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj"]),
        ("llama-tied", "all-linear"),
        ("opt", ["fc1", "out_proj"]),
        ("bert", ["query", "dense"]),
        ("t5", ["q", "wo"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", [0, 2])
def test_equals_peft(tmp_path, name, targets, depth):
    config = PeanutConfig(r=6, target_modules=targets, depth=depth)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.method == "peanut" and form.rank == 6 and form.uses_base_weights


@pytest.mark.parametrize(
    "option",
    [
        {"scaling": 0.3},
        {"depth": 1},
        {"depth": 12},
        *({"act_fn": name, "depth": 1} for name in ("gelu", "silu", "tanh")),
    ],
    ids=str,
)
def test_equals_peft_with(tmp_path, option):
    config = PeanutConfig(r=6, target_modules=["q_proj", "down_proj"], **option)
    check_exact(tenant_with(config), tmp_path / "tenant")


def _folder(tmp_path):
    return save(tenant_with(PeanutConfig(r=6, depth=1, target_modules=["q_proj"])), tmp_path / "tenant")


@pytest.mark.parametrize("option", [{"rotates": True}, {"act_fn": "prelu"}, {"act_fn": "xielu"}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


@pytest.mark.parametrize(
    "option",
    [{"r": None}, {"depth": -1}, {"depth": 1 << 30}, {"scaling": 10**400}, {"act_fn": "sin"}, {"act_fn": []}],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), CheckpointError, next(iter(option)), option)


_ITEMS = ["peanut_A.weight", "peanut_B.weight", "peanut_encoders.0.weight", "peanut_decoders.0.weight"]


@pytest.mark.parametrize("item", _ITEMS)
def test_another_shape_is_refused(tmp_path, item):
    check_refused(_folder(tmp_path), ShapeMismatchError, f"{item}.*q_proj", tensors=replacing(torch.ones(7), item))


@pytest.mark.parametrize("item", _ITEMS)
def test_a_missing_tensor_is_named(tmp_path, item):
    check_refused(_folder(tmp_path), CheckpointError, f"q_proj has no {item};", tensors=without(item))


def test_a_layer_too_many_is_named(tmp_path):
    check_refused(_folder(tmp_path), CheckpointError, "peanut_decoders", {"depth": 0})
