"""DEFT and PaRa checkpoints → canonical form."""

import pytest
import torch
from peft import DeftConfig
from peft_folders import replacing, save, without
from tenants import check_exact, check_refused, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

_TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "llama-tied": "all-linear",
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "classifier"],
    "t5": ["q", "wo"],
}


@pytest.mark.parametrize("name", _TARGETS)
@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("para", [False, True])
def test_equals_peft(tmp_path, name, method, para):
    config = DeftConfig(r=4, target_modules=_TARGETS[name], decomposition_method=method, para=para)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.method == ("para" if para else "deft") and form.rank == 4 and form.uses_base_weights


@pytest.mark.parametrize("option", [{"alpha": 10}, {"alpha": 0}, {"init_weights": False}], ids=str)
def test_equals_peft_with(tmp_path, option):
    check_exact(tenant_with(DeftConfig(r=4, target_modules=["q_proj"], **option)), tmp_path / "tenant")


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_a_rank_above_the_outputs_is_cut_as_peft_cuts_it(tmp_path, method):
    config = DeftConfig(r=9, alpha=6, target_modules=["classifier"], decomposition_method=method)
    form = check_exact(tenant_with(config, "bert"), tmp_path / "tenant", "bert")
    assert form.rank == 5


def _folder(tmp_path):
    return save(tenant_with(DeftConfig(r=4, target_modules=["q_proj"])), tmp_path / "tenant")


@pytest.mark.parametrize("option", [{"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


@pytest.mark.parametrize(
    "option",
    [{"r": 1.5}, {"decomposition_method": "svd"}, {"decomposition_method": ...}, {"alpha": 10**400}, {"para": "yes"}],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), CheckpointError, next(iter(option)), option)


@pytest.mark.parametrize("item", ["deft_P", "deft_R"])
def test_another_shape_is_refused(tmp_path, item):
    check_refused(_folder(tmp_path), ShapeMismatchError, f"{item}.*q_proj", tensors=replacing(torch.ones(7), item))


@pytest.mark.parametrize("item", ["deft_P", "deft_R"])
def test_a_missing_tensor_is_named(tmp_path, item):
    check_refused(_folder(tmp_path), CheckpointError, f"q_proj has no {item};", tensors=without(item))


def test_an_injection_that_para_would_overlook_is_refused(tmp_path):
    check_refused(_folder(tmp_path), CheckpointError, "q_proj has a deft_R, which", {"para": True})
