"""VeRA and PVeRA checkpoints → canonical form."""

import copy

import pytest
import torch
from peft import PeftModel, PveraConfig, VeraConfig
from peft_folders import WEIGHTS, base_of, edit_config, relative, save, without
from safetensors.torch import load_file
from tenants import check_exact, check_refused, form_of, tenant_with

import lorakit
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.errors import CheckpointError, LorakitError, ShapeMismatchError, UnsupportedMethodError

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not")

CASES = [
    ("llama", ["q_proj", "k_proj", "down_proj"]),
    ("llama", "all-linear"),
    ("llama-tied", ["v_proj", "up_proj"]),
    ("gpt2", ["c_attn", "mlp.c_proj"]),
    ("bert", ["query", "output.dense"]),
    ("t5", ["q", "wo"]),
]
KINDS = [VeraConfig, PveraConfig]


def small(kind=VeraConfig, **options):
    return tenant_with(kind(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "targets"), CASES, ids=str)
def test_equals_peft(tmp_path, kind, name, targets):
    config = kind(r=6, target_modules=targets)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.method == config.peft_type.lower() and form.rank == 6 and not form.uses_base_weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "targets"), CASES[:4], ids=str)
def test_projections_that_are_not_saved(tmp_path, kind, name, targets):
    config = kind(r=6, target_modules=targets, save_projection=False, projection_prng_key=7)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.uses_base_weights and not any("base_model" in key for key in form.extras)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_projections_that_are_not_saved_are_rounded_as_the_base_is(tmp_path, kind, dtype):
    base = base_of("llama", dtype)
    folder = save(small(kind, save_projection=False), tmp_path / "tenant")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    form = convert("tenant", folder, BaseModel.of(base))
    for path, module in form.modules.items():
        delta = reloaded.base_model.model.get_submodule(path).get_delta_weight("default")
        assert relative(module.b.double() @ module.a.double(), delta) < 1e-6
        assert relative(module.b.double() @ module.a.double(), _delta(form_of(folder), path)) > 1e-4


def _delta(form, path):
    return form.modules[path].b.double() @ form.modules[path].a.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"r": 40}, {"r": 1}, {"layers_to_transform": [1]}, {"init_weights": False}], ids=str
)
def test_options(tmp_path, kind, options):
    check_exact(small(kind, **options), tmp_path / "tenant")


def test_a_live_model():
    form = form_of(small())
    assert form.rank == 4


@pytest.mark.parametrize("seed", [0, None])
def test_sampling_is_refused(tmp_path, seed):
    folder = save(small(PveraConfig, sample_at_inference=True, generator_seed=seed), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match=r"sample_at_inference.*drawn anew"):
        form_of(folder)


def test_a_generator_that_only_training_uses(tmp_path):
    check_exact(small(PveraConfig, generator_seed=3), tmp_path / "tenant")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotates": True}, "rotates"),
    ],
    ids=str,
)
def test_options_that_are_refused(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), UnsupportedMethodError, message, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "has shape"),
        ({"r": 0}, "r of adapter_config.json is 0"),
        ({"r": 2**31 - 1}, "has shape"),
        ({"r": 10**400}, "r of adapter_config.json"),
        ({"r": True}, "r of adapter_config.json"),
        ({"r": ...}, "missing"),
        ({"save_projection": "yes"}, "save_projection"),
        ({"save_projection": False}, "save_projection is false, but the shared matrices"),
        ({"save_projection": None}, "save_projection is false"),
        ({"projection_prng_key": -1}, "projection_prng_key"),
        ({"projection_prng_key": 1 << 64}, "projection_prng_key"),
        ({"projection_prng_key": 0.5}, "projection_prng_key"),
        ({"projection_prng_key": None}, "projection_prng_key"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"layers_pattern": "layers"}, "PEFT does not take"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_cannot_be(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), CheckpointError, message, change)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["lambda_b", "lambda_d", "vera_A", "vera_B"])
def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path, kind, part):
    folder = save(small(kind), tmp_path / "tenant")

    def cut(tensors):
        key = next(key for key in tensors if part in key)
        tensors[key] = tensors[key][1:]

    check_refused(folder, ShapeMismatchError, part, tensors=cut)
    check_refused(folder, CheckpointError, rf"{part}.*(incomplete|not in the checkpoint)", tensors=without(part))


def test_projections_wider_than_the_modules_need(tmp_path):
    check_refused(
        save(small(), tmp_path / "tenant"),
        ShapeMismatchError,
        "vera_A",
        tensors=lambda tensors: tensors.update({"base_model.vera_A": torch.ones(4, 49)}),
    )


def test_a_stray_shared_tensor(tmp_path):
    check_refused(
        save(small(), tmp_path / "tenant"),
        CheckpointError,
        "'base_model.pvera_A' is not part of a VeRA",
        tensors=lambda tensors: tensors.update({"base_model.pvera_A": torch.ones(4, 48)}),
    )


def test_an_embedding(tmp_path):
    folder = save(small(), tmp_path / "tenant")
    edit_config(folder, target_modules=["q_proj", "down_proj", "embed_tokens"])
    where = "base_model.model.model.embed_tokens.vera_lambda_"
    check_refused(
        folder,
        LorakitError,
        "embed_tokens .*than its embedding",
        tensors=lambda tensors: tensors.update({where + "b": torch.ones(32), where + "d": torch.ones(4)}),
    )


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
