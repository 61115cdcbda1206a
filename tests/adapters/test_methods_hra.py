"""HRA checkpoints → canonical form."""

import pytest
import torch
from peft import HRAConfig
from peft_folders import key_of, replacing, save
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.errors import CheckpointError, NonFiniteWeightsError, ShapeMismatchError, UnsupportedMethodError

_TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "llama-tied": "all-linear",
    "opt": ["fc1", "out_proj"],
    "bert": ["query", "classifier"],
    "t5": ["q", "wo"],
}


@pytest.mark.parametrize("name", _TARGETS)
@pytest.mark.parametrize("orthonormal", [False, True])
def test_equals_peft(tmp_path, name, orthonormal):
    config = HRAConfig(r=4, target_modules=_TARGETS[name], apply_GS=orthonormal, init_weights=False)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.method == "hra" and form.rank == 4 and form.uses_base_weights


@pytest.mark.parametrize("r", [1, 5, 40])
def test_reflections_of_any_number(tmp_path, r):
    config = HRAConfig(r=r, target_modules=["q_proj"], init_weights=False)
    assert check_exact(tenant_with(config), tmp_path / "tenant").rank == r


def _folder(tmp_path, **options):
    config = HRAConfig(r=4, target_modules=["q_proj"], **options)
    return save(tenant_with(config, spread=0.0), tmp_path / "tenant")


def test_an_untrained_adapter_does_nothing(tmp_path):
    form = form_of(_folder(tmp_path))
    for module in form.modules.values():
        assert (module.b @ module.a).abs().max() < 1e-5


def test_dependent_columns_have_no_orthonormal_basis(tmp_path):
    with pytest.raises(CheckpointError, match=r"q_proj.*linearly dependent"):
        form_of(_folder(tmp_path, apply_GS=True))


def test_more_columns_than_inputs_have_no_orthonormal_basis(tmp_path):
    config = HRAConfig(r=40, target_modules=["q_proj"], apply_GS=True, init_weights=False)
    with pytest.raises(CheckpointError, match="linearly dependent"):
        form_of(save(tenant_with(config), tmp_path / "tenant"))


def test_a_zero_column_is_refused(tmp_path):
    check_refused(
        _folder(tmp_path),
        NonFiniteWeightsError,
        "q_proj",
        tensors=lambda tensors: tensors[key_of(tensors, "hra_u")][:, 0].zero_(),
    )


@pytest.mark.parametrize("option", [{"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


@pytest.mark.parametrize("option", [{"r": "4"}, {"r": 10**400}, {"r": ...}, {"apply_GS": 1}], ids=str)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), CheckpointError, next(iter(option)), option)


@pytest.mark.parametrize("shape", [(32, 3), (4, 32), (32,), ()], ids=str)
def test_another_shape_is_refused(tmp_path, shape):
    check_refused(_folder(tmp_path), ShapeMismatchError, "q_proj", tensors=replacing(torch.ones(shape), "hra_u"))
