"""Uni-LoRA checkpoints → canonical form."""

import copy

import pytest
import torch
from peft import PeftModel, UniLoraConfig
from peft_folders import WEIGHTS, base_of, relative, save, without
from safetensors.torch import load_file
from tenants import check_exact, check_refused, form_of, tenant_with

import lorakit
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


def small(**options):
    options = {"r": 3, "theta_d_length": 50, "target_modules": ["q_proj", "down_proj"], **options}
    return tenant_with(UniLoraConfig(**options), spread=1.0)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj"]),
        ("llama", "all-linear"),
        ("llama", ["lm_head", "v_proj"]),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("bert", ["query", "output.dense"]),
        ("t5", ["q", "wo"]),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, saved):
    config = UniLoraConfig(r=3, theta_d_length=50, target_modules=targets, save_indices=saved)
    form = check_exact(tenant_with(config, name, spread=1.0), tmp_path / "tenant", name)
    assert form.method == "unilora" and form.rank == 3 and form.uses_base_weights is not saved


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"theta_d_length": 1}, {"theta_d_length": 5000}, {"proj_seed": 0}, {"r": 1}, {"layers_to_transform": [1]}],
    ids=str,
)
def test_options(tmp_path, options, saved):
    check_exact(small(save_indices=saved, **options), tmp_path / "tenant")


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_rounded_as_the_base_is(tmp_path, dtype, saved):
    base = base_of("llama", dtype)
    folder = save(small(save_indices=saved), tmp_path / "tenant")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    form = convert("tenant", folder, BaseModel.of(base))
    for path, module in form.modules.items():
        a, b = reloaded.base_model.model.get_submodule(path)._get_lora_matrices("default")
        assert relative(module.a, a) < 1e-6 and relative(module.b, b) < 1e-6


def test_a_live_model():
    assert form_of(small()).rank == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x": 1}, "x")],
    ids=str,
)
def test_options_that_are_refused(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), UnsupportedMethodError, message, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2**31 - 1}, "r is 2147483647, more than"),
        ({"r": 0}, "r of adapter_config.json"),
        ({"theta_d_length": 2**31 - 1}, "vector has shape"),
        ({"theta_d_length": None}, "theta_d_length"),
        ({"proj_seed": -1}, "proj_seed"),
        ({"proj_seed": "42"}, "proj_seed"),
        ({"proj_seed": ...}, "proj_seed"),
        ({"save_indices": True}, "save_indices is true, but the indices and scales are not"),
        ({"target_modules": ["nothing"]}, "names no module"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens .*than its embedding"),
        ({"unilora_dropout": "x"}, "PEFT does not take"),
    ],
    ids=str,
)
def test_values_that_cannot_be(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), CheckpointError, message, change)


@pytest.mark.parametrize("part", ["indices_A", "scales_B", "theta_d"])
def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path, part):
    folder = save(small(save_indices=True), tmp_path / "tenant")

    def cut(tensors):
        key = next(key for key in tensors if part in key)
        tensors[key] = tensors[key][1:]

    check_refused(folder, ShapeMismatchError, part.replace("theta_d", "vector"), tensors=cut)
    check_refused(folder, CheckpointError, rf"{part}.*incomplete", tensors=without(part))


def test_indices_that_cannot_be(tmp_path):
    check_refused(
        save(small(save_indices=True), tmp_path / "tenant"),
        CheckpointError,
        "indices_B of .* index out of the vector",
        tensors=lambda tensors: next(t for k, t in tensors.items() if "indices_B" in k).fill_(50),
    )


def test_indices_against_the_configuration(tmp_path):
    check_refused(
        save(small(save_indices=True), tmp_path / "tenant"),
        CheckpointError,
        "save_indices is false, but the indices and scales are in",
        {"save_indices": False},
    )


def test_a_key_of_another_method(tmp_path):
    folder = save(small(), tmp_path / "tenant")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    check_refused(
        folder,
        CheckpointError,
        "not part of a Uni-LoRA",
        tensors=lambda tensors: tensors.update({key: torch.ones(3, 32)}),
    )


def test_a_bank_gives_it_back(tmp_path):
    folder = save(small(save_indices=True), tmp_path / "tenant")
    bank = lorakit.export([folder], tmp_path / "bank", base_model=base_of())
    stored, given = load_file(folder / WEIGHTS), load_file(bank.export_peft("tenant", tmp_path / "back") / WEIGHTS)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)


def test_what_is_drawn_again_needs_a_plain_base(tmp_path, monkeypatch):
    """A packed weight, played: its dtype says nothing of what PEFT rounds to."""
    folder = save(small(), tmp_path / "tenant")
    monkeypatch.setattr(BaseModel, "stored", lambda self, name: None)
    with pytest.raises(UnsupportedMethodError, match="random tensors are not saved.*packed"):
        form_of(folder)
