"""PSOFT checkpoints → canonical form."""

import pytest
import torch
from peft import PsoftConfig
from peft_folders import edit_config, replacing, save, without
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

_OPTIONS = {"r": 6, "psoft_alpha": 4}


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
def test_equals_peft(tmp_path, name, targets):
    form = check_exact(tenant_with(PsoftConfig(target_modules=targets, **_OPTIONS), name), tmp_path / "tenant", name)
    assert form.method == "psoft" and form.rank == 6 and form.uses_base_weights


@pytest.mark.parametrize(
    "option",
    [
        {"r": 1},
        {"psoft_orth": False},
        {"psoft_mag_a": False},
        {"psoft_mag_b": False},
        {"psoft_mag_a": False, "psoft_mag_b": False},
        {"ab_svd_init": "pissa_init"},
        {"psoft_svd": "lowrank"},
        {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1, "random_seed": 7},
        {"use_cayley_neumann": True},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 1},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 9, "cayley_neumann_eps": 0.5},
    ],
    ids=str,
)
def test_equals_peft_with(tmp_path, option):
    config = PsoftConfig(target_modules=["q_proj", "down_proj"], **(_OPTIONS | option))
    form = check_exact(tenant_with(config), tmp_path / "tenant")
    assert form.rank == config.r


def _folder(tmp_path, **options):
    config = PsoftConfig(target_modules=["q_proj"], **_OPTIONS, **options)
    return save(tenant_with(config), tmp_path / "tenant")


@pytest.mark.parametrize("option", [{"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


@pytest.mark.parametrize(
    "option",
    [
        {"r": 0},
        {"psoft_alpha": 0},
        {"psoft_alpha": float("nan")},
        {"psoft_orth": None},
        {"psoft_svd": "random"},
        {"ab_svd_init": []},
        {"num_cayley_neumann_terms": 1 << 30},
        {"psoft_svd_lowrank_niter": 1 << 30},
        {"random_seed": 1 << 80},
        {"cayley_neumann_eps": "small"},
        {"cayley_neumann_eps": 2.0, "use_cayley_neumann": True},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), CheckpointError, next(iter(option)), option)


def test_a_bound_that_is_not_given_is_none_as_for_peft(tmp_path):
    folder = _folder(tmp_path)
    expected = form_of(folder)
    edit_config(folder, cayley_neumann_eps=...)
    form = form_of(folder)
    assert all(torch.equal(form.modules[path].b, module.b) for path, module in expected.modules.items())


def test_a_random_projection_without_its_seed_is_refused(tmp_path):
    check_refused(_folder(tmp_path, psoft_svd="lowrank"), CheckpointError, "random_seed", {"random_seed": ...})


def test_a_rank_above_the_weights_is_refused(tmp_path):
    check_refused(_folder(tmp_path), ShapeMismatchError, "q_proj", {"r": 1 << 30})


def test_another_shape_is_refused(tmp_path):
    check_refused(
        _folder(tmp_path), ShapeMismatchError, "q_proj", tensors=replacing(torch.ones(6, 6), "psoft_R.weight")
    )


@pytest.mark.parametrize("item", ["weight", "vector_a", "vector_b"])
def test_a_missing_tensor_is_named(tmp_path, item):
    check_refused(
        _folder(tmp_path), CheckpointError, rf"q_proj has no psoft_R\.{item};", tensors=without(f"psoft_R.{item}")
    )
