"""TinyLoRA checkpoints → canonical form."""

import copy

import pytest
import torch
from peft import PeftModel, TinyLoraConfig
from peft_folders import WEIGHTS, base_of, relative, save, without
from safetensors.torch import load_file
from tenants import check_exact, check_refused, form_of, tenant_with

import lorakit
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")


def small(**options):
    return tenant_with(TinyLoraConfig(**{"r": 2, "u": 5, "target_modules": ["q_proj", "down_proj"], **options}))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj"]),
        ("llama", "all-linear"),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("bert", ["query", "output.dense"]),
        ("t5", ["q", "wo"]),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, saved):
    config = TinyLoraConfig(r=3, u=5, target_modules=targets, save_projection=saved)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.method == "tinylora" and form.rank == 3 and form.uses_base_weights is not saved


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"weight_tying": 1.0},
        {"weight_tying": 0.5},
        {"weight_tying": 0.3, "target_modules": "all-linear"},
        {"projection_seed": 0},
        {"r": 40},
        {"u": 1},
        {"init_weights": "uniform"},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_options(tmp_path, options, saved):
    check_exact(small(save_projection=saved, **options), tmp_path / "tenant")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_that_are_not_saved_are_rounded_as_the_base_is(tmp_path, dtype):
    base = base_of("llama", dtype)
    folder = save(small(save_projection=False), tmp_path / "tenant")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    form = convert("tenant", folder, BaseModel.of(base))
    for path, module in form.modules.items():
        delta = reloaded.base_model.model.get_submodule(path).get_delta_weight("default")
        assert relative(module.b.double() @ module.a.double(), delta) < 1e-6


def test_a_live_model():
    assert form_of(small()).rank == 2


def test_an_embedding_is_refused(tmp_path):
    folder = save(small(target_modules=["embed_tokens", "q_proj"]), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match="embedding model.embed_tokens"):
        form_of(folder)


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
        ({"r": 3}, "has shape"),
        ({"r": 2**31 - 1}, "has shape"),
        ({"r": None}, "r of adapter_config.json"),
        ({"u": 4}, "has shape"),
        ({"u": 2**31 - 1}, "has shape"),
        ({"weight_tying": 0.5}, "want 2 vectors"),
        ({"weight_tying": 1.5}, "PEFT does not take"),
        ({"weight_tying": float("nan")}, "weight_tying"),
        ({"weight_tying": 10**400}, "weight_tying"),
        ({"weight_tying": ...}, "weight_tying"),
        ({"projection_seed": -1}, "projection_seed"),
        ({"save_projection": False}, "save_projection is false, but the random matrices of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_cannot_be(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), CheckpointError, message, change)


@pytest.mark.parametrize("part", ["tinylora_A", "tinylora_B", "tinylora_P", "tinylora_v"])
def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path, part):
    folder = save(small(), tmp_path / "tenant")

    def cut(tensors):
        key = next(key for key in tensors if part in key)
        tensors[key] = tensors[key][1:]

    check_refused(folder, ShapeMismatchError, part.replace("tinylora_v", "vector"), tensors=cut)
    check_refused(folder, CheckpointError, r"(incomplete|not in the checkpoint|want 4 vectors)", tensors=without(part))


def test_a_bank_gives_it_back(tmp_path):
    folder = save(small(), tmp_path / "tenant")
    bank = lorakit.export([folder], tmp_path / "bank", base_model=base_of())
    stored, given = load_file(folder / WEIGHTS), load_file(bank.export_peft("tenant", tmp_path / "back") / WEIGHTS)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)


def test_what_is_drawn_again_needs_a_plain_base(tmp_path, monkeypatch):
    """A packed weight, played: its dtype says nothing of what PEFT rounds to."""
    folder = save(small(save_projection=False), tmp_path / "tenant")
    monkeypatch.setattr(BaseModel, "stored", lambda self, name: None)
    with pytest.raises(UnsupportedMethodError, match="random tensors are not saved.*packed"):
        form_of(folder)
