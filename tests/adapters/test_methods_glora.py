"""GLoRA checkpoints → canonical form."""

from itertools import product

import pytest
import torch
from peft import GloraConfig
from peft_folders import key_of, replacing, save, without
from tenants import check_exact, check_refused, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

_VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
_CHOICES = set(product(["vector", "constant", "none"], ["lora", "vector", "none"], ["vector", "constant", "none"]))
_CHOICES = sorted(_CHOICES - {("none",) * 3})


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("llama-tied", "all-linear"),
        ("opt", ["fc1", "out_proj"]),
        ("bert", ["query", "dense"]),
        ("t5", ["q", "wo"]),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets):
    form = check_exact(tenant_with(GloraConfig(target_modules=targets, **_VECTORS), name), tmp_path / "tenant", name)
    assert form.method == "glora" and form.rank == 1 and form.uses_base_weights


@pytest.mark.parametrize(("weight", "coupling", "bias"), _CHOICES, ids=str)
def test_every_choice_equals_peft(tmp_path, weight, coupling, bias):
    config = GloraConfig(
        target_modules=["q_proj", "k_proj"], r=3, config_A_B=weight, config_C=coupling, config_D_E=bias
    )
    form = check_exact(tenant_with(config), tmp_path / "tenant")
    assert form.rank == (weight != "none")


def _folder(tmp_path, **options):
    config = GloraConfig(target_modules=["q_proj"], **(_VECTORS | options))
    return save(tenant_with(config), tmp_path / "tenant")


@pytest.mark.parametrize("value", ["lora", ...])
def test_a_matrix_on_the_weight_is_refused(tmp_path, value):
    check_refused(_folder(tmp_path, config_A_B="lora"), UnsupportedMethodError, "config_A_B", {"config_A_B": value})


def test_an_output_taken_away_and_replaced_is_refused(tmp_path):
    check_refused(
        _folder(tmp_path),
        UnsupportedMethodError,
        "q_proj",
        tensors=lambda tensors: tensors[key_of(tensors, "glora_A")].fill_(-1),
    )


def test_an_output_taken_away(tmp_path):
    tenant = tenant_with(GloraConfig(target_modules=["q_proj"], **_VECTORS))
    with torch.no_grad():
        for name, parameter in tenant.named_parameters():
            if "glora_A" in name or "glora_B" in name:
                parameter[0] = -1 if "glora_A" in name else 0
    check_exact(tenant, tmp_path / "tenant")


@pytest.mark.parametrize("option", [{"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


@pytest.mark.parametrize(
    "option", [{"config_A_B": "sparse"}, {"config_C": "constant"}, {"config_D_E": "lora"}, {"config_C": []}], ids=str
)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), CheckpointError, next(iter(option)), option)


@pytest.mark.parametrize("letter", "ABCDE")
def test_another_shape_is_refused(tmp_path, letter):
    check_refused(
        _folder(tmp_path),
        ShapeMismatchError,
        rf"glora_{letter}.*q_proj",
        tensors=replacing(torch.ones(7), f"glora_{letter}"),
    )


@pytest.mark.parametrize("letter", "ABCDE")
def test_a_missing_tensor_is_named(tmp_path, letter):
    check_refused(_folder(tmp_path), CheckpointError, rf"q_proj.*glora_{letter}", tensors=without(f"glora_{letter}"))


def test_a_tensor_without_use_is_refused(tmp_path):
    check_refused(
        _folder(tmp_path, config_C="lora", r=1),
        CheckpointError,
        r"q_proj has a glora_D\.Xd, which",
        tensors=lambda t: t.update({key_of(t, "q_proj.glora_D").replace("_D.X", "_D.Xd"): torch.ones(32, 1)}),
    )


def test_what_stands_for_nothing_must_be_zero(tmp_path):
    check_refused(
        _folder(tmp_path, config_A_B="none"),
        CheckpointError,
        r"glora_B\.zeros",
        tensors=lambda tensors: tensors[key_of(tensors, "glora_B")].fill_(1),
    )
