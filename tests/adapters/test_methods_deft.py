"""DEFT and PaRa checkpoints → canonical form."""

import pytest
import torch
from peft import DeftConfig
from peft_folders import edit_config, edit_tensors, key_of, save
from tenants import check_exact, form_of, tenant_with

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


@pytest.mark.parametrize(
    "option", [{"bias": "deft_only"}, {"modules_to_save": ["lm_head"]}, {"rotates": True}], ids=str
)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    folder = _folder(tmp_path)
    edit_config(folder, **option)
    with pytest.raises(UnsupportedMethodError, match=next(iter(option))):
        form_of(folder)


@pytest.mark.parametrize(
    "option",
    [{"r": 1.5}, {"decomposition_method": "svd"}, {"decomposition_method": ...}, {"alpha": 10**400}, {"para": "yes"}],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    folder = _folder(tmp_path)
    edit_config(folder, **option)
    with pytest.raises(CheckpointError, match=next(iter(option))):
        form_of(folder)


@pytest.mark.parametrize("item", ["deft_P", "deft_R"])
def test_another_shape_is_refused(tmp_path, item):
    folder = _folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({key_of(tensors, item): torch.ones(7)}))
    with pytest.raises(ShapeMismatchError, match=f"{item}.*q_proj"):
        form_of(folder)


@pytest.mark.parametrize("item", ["deft_P", "deft_R"])
def test_a_missing_tensor_is_named(tmp_path, item):
    folder = _folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop(key_of(tensors, item)))
    with pytest.raises(CheckpointError, match=f"q_proj has no {item};"):
        form_of(folder)


def test_an_injection_that_para_would_overlook_is_refused(tmp_path):
    folder = _folder(tmp_path)
    edit_config(folder, para=True)
    with pytest.raises(CheckpointError, match="q_proj has a deft_R, which"):
        form_of(folder)
