"""AdaMSS checkpoints → canonical form."""

import sys

import pytest
import torch
from peft import AdamssConfig
from peft.tuners.adamss.layer import Linear
from peft_folders import key_of, replacing, save, without
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.errors import CheckpointError, MissingDependencyError, ShapeMismatchError, UnsupportedMethodError

pytest.importorskip("sklearn", reason="PEFT's AdaMSS needs scikit-learn")


_OPTIONS = {"r": 12, "num_subspaces": 3, "subspace_rank": 2}


@pytest.fixture(autouse=True)
def _dtype_of_the_weight(monkeypatch):
    """PEFT's layer keeps the dtype that it was made with; the reference is cast to fp64."""

    def apply(layer, *args, **kwargs):
        torch.nn.Module._apply(layer, *args, **kwargs)
        layer.dtype = layer.base_layer.weight.dtype
        return layer

    monkeypatch.setattr(Linear, "_apply", apply)


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
    form = check_exact(tenant_with(AdamssConfig(target_modules=targets, **_OPTIONS), name), tmp_path / "tenant", name)
    assert form.method == "adamss" and form.rank == 6 and form.uses_base_weights


@pytest.mark.parametrize(
    "option",
    [
        {"r": 100},
        {"r": 4, "subspace_rank": 4},
        {"num_subspaces": 1},
        {"num_subspaces": 20},
        {"use_dynamic_rank": True, "subspace_rank": 5},
        {"use_asa": True},
        {"random_seed": 7},
        {"init_weights": None},
    ],
    ids=str,
)
def test_equals_peft_with(tmp_path, option):
    config = AdamssConfig(target_modules=["q_proj", "down_proj"], **(_OPTIONS | option))
    check_exact(tenant_with(config), tmp_path / "tenant")


def test_more_subspaces_than_outputs(tmp_path):
    config = AdamssConfig(target_modules=["classifier"], **(_OPTIONS | {"num_subspaces": 9}))
    form = check_exact(tenant_with(config, "bert"), tmp_path / "tenant", "bert")
    assert form.rank == 5


def _folder(tmp_path, **options):
    config = AdamssConfig(target_modules=["q_proj"], **(_OPTIONS | options))
    return save(tenant_with(config), tmp_path / "tenant")


@pytest.mark.parametrize("option", [{"rotates": True}], ids=str)
def test_an_option_that_is_not_served_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), UnsupportedMethodError, next(iter(option)), option)


@pytest.mark.parametrize("option", [{"r": 0}, {"num_subspaces": True}, {"random_seed": "x"}], ids=str)
def test_a_value_that_cannot_be_is_refused(tmp_path, option):
    check_refused(_folder(tmp_path), CheckpointError, next(iter(option)), option)


@pytest.mark.parametrize("seed", [3, ...])
def test_another_decomposition_is_refused(tmp_path, seed):
    """A file without the seed is an older PEFT's, which drew without one."""
    check_refused(_folder(tmp_path, random_seed=7), CheckpointError, r"adamss_newB.*q_proj", {"random_seed": seed})


def test_a_flipped_singular_vector_is_refused(tmp_path):
    check_refused(
        _folder(tmp_path),
        CheckpointError,
        r"adamss_newB.*q_proj",
        tensors=lambda tensors: tensors[key_of(tensors, "adamss_newB")][0].neg_(),
    )


@pytest.mark.parametrize("item", ["adamss_A.1", "adamss_B.1", "adamss_newB"])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 12), ()], ids=str)
def test_another_shape_is_refused(tmp_path, item, shape):
    check_refused(_folder(tmp_path), ShapeMismatchError, "q_proj", tensors=replacing(torch.ones(shape), item))


@pytest.mark.parametrize("item", ["adamss_A.1", "adamss_B.1", "adamss_newB"])
def test_a_missing_tensor_is_named(tmp_path, item):
    check_refused(_folder(tmp_path), CheckpointError, f"q_proj has no {item}", tensors=without(item))


def test_a_subspace_too_many_is_named(tmp_path):
    check_refused(_folder(tmp_path), CheckpointError, r"q_proj has a adamss_A\.2, which", {"num_subspaces": 2})


def test_without_scikit_learn_it_is_named(tmp_path, monkeypatch):
    folder = _folder(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match="scikit-learn"):
        form_of(folder)
