"""LoRA on the parameters of experts: what PEFT's target_parameters makes, in every version's layout."""

import copy
import json
import math

import pytest
import torch
from compatibility import served
from mixtures import EXPERTS, MIXTURES, in_double, mixture_of, one_row, relative, tenant_of
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft_folders import CONFIG, WEIGHTS, edit_config, edit_tensors, key_of, save
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lorakit import AdapterBank, MultiLoraModel, export
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.merging import Recipe
from lorakit.adapters.methods import restore
from lorakit.adapters.places import parameter_places
from lorakit.errors import (
    CheckpointError,
    ModuleNotFoundInBaseError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnsupportedMethodError,
)

OPTIONS = {
    "both": {},
    "first": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "last": {"target_parameters": ["down_proj"], "use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*0.mlp.experts.gate_up_proj": 3, "down_proj": 2},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 5},
    },
    "with modules": {"target_modules": ["q_proj", "embed_tokens"]},
    "no modules": {"target_modules": None},
    "routers": {"target_parameters": ["gate.weight", "router.weight", "experts.down_proj"], "r": 3},
}


def form_of(source, base):
    return convert("tenant", source, BaseModel.of(base))


def wrappers(tenant):
    """Parameter path → PEFT's wrapper of it."""
    found = {}
    for path, module in tenant.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):
            found[f"{path.replace('.base_layer', '')}.{module.parameter_name}"] = module
    return found


def product(module):
    """s · B A of every expert, (E, out, in), in fp64."""
    return module.scale * module.b.double() @ module.a.double()


def as_stored(base, path, delta):
    """(E, out, in) as the base stores the parameter."""
    return delta.mT if parameter_places(base)[path].transposed else delta


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_the_form_is_what_peft_computes_and_gives_the_checkpoint_back(name, options, tmp_path):
    base, tenant = mixture_of(name), tenant_of(name, 0, **options)
    form = form_of(save(tenant, tmp_path / "x"), base)
    found = wrappers(tenant)
    assert {path for path, module in form.modules.items() if module.kind in ("experts", "router")} == found.keys()
    for path, wrapper in found.items():
        expected = wrapper.double().get_delta_weight("default")
        assert relative(as_stored(base, path, product(form.modules[path])), expected) < 1e-14
        assert form.modules[path].rank == wrapper.r["default"]
    stored, given = load_file(tmp_path / "x" / WEIGHTS), restore(form)
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_logits_equal_pefts_and_a_base_row_beside_it_is_the_bases(name, tmp_path):
    parameters = [*EXPERTS["target_parameters"], "gate.weight", "router.weight"]
    base, tenant = mixture_of(name), tenant_of(name, 0, target_modules=["q_proj"], target_parameters=parameters)
    bank = export({"tenant": save(tenant, tmp_path / "x")}, tmp_path / "bank", base_model=base)
    inputs = MIXTURES[name].inputs(2)
    mixed = MultiLoraModel(copy.deepcopy(base), bank)(**inputs, adapter_ids=["tenant", None]).logits
    error = relative(mixed[0], in_double(tenant)(**one_row(inputs, 0)).logits[0])
    assert error <= 2e-5
    assert relative(mixed[1], base(**inputs).logits[1]) <= 1e-6
    served("lora", name, {"Linear", "experts", "router"}, error)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_bank_gives_the_checkpoint_back_bit_for_bit(name, tmp_path):
    tenant = save(tenant_of(name, 0, target_modules=["q_proj"]), tmp_path / "x")
    export({"tenant": tenant}, tmp_path / "bank", base_model=mixture_of(name))
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert bank["tenant"].rank == 4
    bank.verify()
    bank.export_peft("tenant", tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads((tenant / CONFIG).read_text())
    given, stored = load_file(tmp_path / "out" / WEIGHTS), load_file(tenant / WEIGHTS)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)
    PeftModel.from_pretrained(copy.deepcopy(mixture_of(name)), tmp_path / "out")


# Layouts of older versions. "A" (E·r, ·) and "B" (·, r·E) are on the sides of the stored weight (E, d1, d2) that the
# version's peft/tuners/lora/layer.py says; `first` is whether "A" is on d1.


def effective(base, checkpoint, first):
    """The base with the product of v0.18.0 ("o r e, e r i -> e i o") or of v0.19.1's swap ("… -> e o i") added."""
    tensors = load_file(checkpoint / WEIGHTS)
    config = json.loads((checkpoint / CONFIG).read_text())
    changed = copy.deepcopy(base)
    for path in parameter_places(base):
        module, _, name = path.rpartition(".")
        if name not in config["target_parameters"]:
            continue
        wrapped = len(config["target_parameters"]) == 2 and name != "down_proj"
        prefix = f"base_model.model.{module}{'.base_layer' if wrapped else ''}"
        a, b = tensors[f"{prefix}.lora_A.weight"].double(), tensors[f"{prefix}.lora_B.weight"].double()
        weight = changed.get_parameter(path)
        a = a.reshape(len(weight), -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, len(weight))
        delta = torch.einsum("ore,eri->eio" if first else "ore,eri->eoi", b, a)
        weight.data += (config["lora_alpha"] / config["r"] * delta).float()
    return changed


def old_checkpoint(base, folder, version, first, targets):
    """A checkpoint as that version writes it."""
    tenant = tenant_of(None, 0, base, target_parameters=targets)
    save(tenant, folder)
    generator = torch.Generator().manual_seed(1)

    def change(tensors):
        for path, place in parameter_places(base).items():
            module, _, name = path.rpartition(".")
            if name not in targets:
                continue
            wrapped = len(targets) == 2 and name != "down_proj"
            prefix = f"base_model.model.{module}{'.base_layer' if wrapped else ''}"
            sides = base.get_parameter(path).shape[1:]
            sides = sides if first else sides[::-1]
            packed = 4 * place.experts
            tensors[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(packed, sides[0], generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(sides[1], packed, generator=generator)

    edit_tensors(folder, change)
    edit_config(folder, peft_version=version)
    return folder


def square(name):
    """A base whose first parameter is as wide as it is high; gpt-oss's second is."""
    if name == "gpt-oss":
        return mixture_of(name, intermediate_size=32)
    return mixture_of(name, **{"moe_intermediate_size" if name == "qwen3-moe" else "intermediate_size": 16})


SQUARE = {"qwen3-moe": "gate_up_proj", "mixtral": "gate_up_proj", "gpt-oss": "down_proj"}


@torch.no_grad()
def check_layout(base, folder, first):
    inputs = MIXTURES["mixtral"].inputs(2)
    exact = in_double(effective(base, folder, first))(**inputs).logits
    model = MultiLoraModel(copy.deepcopy(base))
    model.load_adapter("tenant", folder)
    assert relative(base(**inputs).logits, exact) > 1e-2
    mixed = model(**inputs, adapter_ids=["tenant", None]).logits
    assert relative(mixed[0], exact[0]) <= 2e-5
    stored, given = load_file(folder / WEIGHTS), restore(form_of(folder, base))
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)


@pytest.mark.parametrize("first", [True, False], ids=["A on d1", "A on d2"])
@pytest.mark.parametrize("name", MIXTURES)
def test_shapes_tell_the_layout_whatever_the_version(name, first, tmp_path):
    base = mixture_of(name)
    targets = ["gate_up_proj", "down_proj"]
    for version in ("0.18.0", "0.19.0", "0.21.2", ...):
        check_layout(base, old_checkpoint(base, tmp_path / str(version), version, first, targets), first)


@pytest.mark.parametrize("first", [True, False], ids=["A on d1", "A on d2"])
@pytest.mark.parametrize("name", MIXTURES)
def test_one_parameter_tells_the_layout_of_a_square_one(name, first, tmp_path):
    base = square(name)
    folder = old_checkpoint(base, tmp_path / "x", "0.19.0", first, ["gate_up_proj", "down_proj"])
    check_layout(base, folder, first)


@pytest.mark.parametrize(
    ("name", "version", "first"),
    [
        *[(name, version, True) for name in MIXTURES for version in (..., None, "0.17.1", "0.18.0", "0.18.1")],
        *[(name, "0.19.0", True) for name in ("qwen3-moe", "mixtral")],
        *[
            (name, version, name == "gpt-oss")
            for name in MIXTURES
            for version in ("0.19.1", "0.20.0", "0.21.2", "0.19.2.dev0@UNKNOWN", "0.20.1.dev0@0123456")
        ],
    ],
)
def test_the_version_tells_the_layout_of_square_parameters(name, version, first, tmp_path):
    base = square(name)
    check_layout(base, old_checkpoint(base, tmp_path / "x", version, first, [SQUARE[name]]), first)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("gpt-oss", "0.19.0"),
        ("mixtral", "0.18.1.dev0@abcdef"),
        ("mixtral", "0.18.2.dev0@abcdef"),
        ("gpt-oss", "0.19.1.dev0@UNKNOWN"),
    ],
)
def test_a_layout_that_nothing_tells_is_refused(name, version, tmp_path):
    base = square(name)
    folder = old_checkpoint(base, tmp_path / "x", version, True, [SQUARE[name]])
    with pytest.raises(UnsupportedMethodError, match=r"as wide as it is high.*train the adapter with a newer PEFT"):
        form_of(folder, base)


@pytest.mark.parametrize("version", ["of tomorrow", 7.5, ["0.18"], {"a": 1}])
def test_a_version_that_is_none_is_refused(version, tmp_path):
    base = square("mixtral")
    folder = old_checkpoint(base, tmp_path / "x", version, True, ["gate_up_proj"])
    if version == 7.5:
        form_of(folder, base)  # it is a version
        return
    with pytest.raises(CheckpointError, match="peft_version of adapter_config.json is"):
        form_of(folder, base)


def test_a_checkpoint_in_two_layouts_is_refused(tmp_path):
    base = mixture_of("mixtral")
    folder = save(tenant_of("mixtral"), tmp_path / "x")

    def turn(tensors):
        a, b = (key_of(tensors, "layers.1", "experts.lora_", factor) for factor in ("lora_A", "lora_B"))
        tensors[a], tensors[b] = tensors[b].T, tensors[a].T

    edit_tensors(folder, turn)
    with pytest.raises(ShapeMismatchError, match=r"on the input of .* and on the output of model.layers.1"):
        form_of(folder, base)


# What cannot be


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_parameters": ["experts.w9"]}, ModuleNotFoundInBaseError, r"no parameter that .*experts\.w9"),
        ({"target_parameters": ["norm.weight"]}, UnsupportedMethodError, r"'model.norm.weight', of shape \(32,\)"),
        ({"target_parameters": ["gate.weight"]}, CheckpointError, "gate.weight has no 'model.layers.0.mlp.gate.lora_A"),
        ({"target_parameters": ["q_proj.weight"]}, UnsupportedMethodError, "q_proj.weight.*target_modules"),
        ({"target_parameters": "down_proj"}, CheckpointError, "target_parameters .*'down_proj'.*list"),
        ({"target_parameters": [7]}, CheckpointError, "target_parameters .*a list of parameters' names"),
        ({"target_parameters": {"a": 1}}, CheckpointError, "target_parameters .*a list"),
        ({"target_parameters": []}, CheckpointError, "target_modules .*is \\[\\]"),
        ({"target_parameters": ["down_proj"]}, ModuleNotFoundInBaseError, "experts.base_layer"),
        ({"target_modules": ["q_proj"]}, CheckpointError, "holds no lora_A"),
        ({"target_modules": 3}, CheckpointError, "target_modules .* is 3"),
        ({"lora_dropout": 0.1}, UnsupportedMethodError, "lora_dropout=0.1 and target_parameters"),
        ({"use_dora": True}, UnsupportedMethodError, "use_dora=True and target_parameters"),
        ({"lora_bias": True}, UnsupportedMethodError, "lora_bias=True and target_parameters"),
        ({"fan_in_fan_out": True}, UnsupportedMethodError, "fan_in_fan_out=True and target_parameters"),
        ({"use_qalora": True}, UnsupportedMethodError, "use_qalora=True and target_parameters"),
        ({"kasa_config": {}}, UnsupportedMethodError, "kasa_config"),
        ({"use_bdlora": {}}, UnsupportedMethodError, "use_bdlora"),
        ({"init_lora_weights": "pissa"}, UnsupportedMethodError, "init_lora_weights='pissa'"),
        ({"r": 5}, ShapeMismatchError, r"LoRA A of model.layers.0.mlp.experts.gate_up_proj .* want \(25, 32\)"),
        ({"r": 1 << 30}, ShapeMismatchError, "LoRA A of"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(changes, error, message, tmp_path):
    folder = save(tenant_of("qwen3-moe"), tmp_path / "x")
    edit_config(folder, **changes)
    with pytest.raises(error, match=message):
        form_of(folder, mixture_of("qwen3-moe"))


def test_tensors_that_are_missing_or_too_many_are_refused(tmp_path):
    base = mixture_of("qwen3-moe")
    folder = save(tenant_of("qwen3-moe"), tmp_path / "missing")
    edit_tensors(folder, lambda tensors: tensors.pop(key_of(tensors, "layers.1", "base_layer.lora_B")))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj has no .*base_layer\.lora_B"):
        form_of(folder, base)
    folder = save(tenant_of("qwen3-moe"), tmp_path / "surplus")
    edit_tensors(
        folder,
        lambda tensors: tensors.update({"base_model.model.model.layers.7.mlp.experts.lora_A.weight": torch.ones(2, 2)}),
    )
    with pytest.raises((CheckpointError, ModuleNotFoundInBaseError), match=r"layers\.7"):
        form_of(folder, base)
    folder = save(tenant_of("qwen3-moe"), tmp_path / "wide")
    edit_tensors(folder, lambda tensors: tensors.update({key_of(tensors, "experts.lora_B"): torch.ones(3)}))
    with pytest.raises(ShapeMismatchError, match=r"LoRA B of .*down_proj has shape \(3,\)"):
        form_of(folder, base)


def test_nan_is_refused_by_its_place(tmp_path):
    folder = save(tenant_of("gpt-oss"), tmp_path / "x")
    edit_tensors(folder, lambda tensors: tensors[key_of(tensors, "layers.1", "experts.lora_A")].fill_(math.nan))
    with pytest.raises(NonFiniteWeightsError, match=r"A of model\.layers\.1\.mlp\.experts\.down_proj"):
        form_of(folder, mixture_of("gpt-oss"))


def test_an_adapter_of_experts_is_no_part_of_a_sum():
    form = form_of(tenant_of("mixtral"), mixture_of("mixtral"))
    with pytest.raises(UnsupportedMethodError, match="by target_parameters"):
        Recipe({"a": 1.0, "b": 1.0}).check({"a": form, "b": form})


def test_a_base_with_other_experts_is_refused(tmp_path):
    folder = save(tenant_of("mixtral"), tmp_path / "x")
    with pytest.raises(ShapeMismatchError, match=r"LoRA A of .*gate_up_proj"):
        form_of(folder, mixture_of("mixtral", num_local_experts=5))


def test_a_single_expert_and_packed_ones_are_no_places():
    config = Qwen3MoeConfig(**{**MIXTURES["qwen3-moe"].options, "num_experts": 1, "num_experts_per_tok": 1})
    assert {place.kind for place in parameter_places(Qwen3MoeForCausalLM(config)).values()} == {"router"}
    base = copy.deepcopy(mixture_of("gpt-oss"))
    base.model.layers[0].mlp.experts.to(torch.float8_e4m3fn)
    kinds = {path: place.kind for path, place in parameter_places(base).items() if path.startswith("model.layers.0.")}
    assert kinds == {"model.layers.0.mlp.router.weight": "router"}


def test_target_modules_never_mean_a_parameter(tmp_path):
    """PEFT renames them for bases whose experts were modules once; it saves what it made of them."""
    tenant = tenant_of("gpt-oss", 0, target_modules=["q_proj", "down_proj"], target_parameters=None)
    form = form_of(save(tenant, tmp_path / "x"), mixture_of("gpt-oss"))
    assert {module.kind for module in form.modules.values()} == {"linear"}
    renamed = tenant_of("qwen3-moe", 0, target_modules=["q_proj", "down_proj"], target_parameters=None)
    form = form_of(renamed, mixture_of("qwen3-moe"))
    assert {path.rpartition(".")[2] for path in form.modules} == {"q_proj", "down_proj"}
    assert len(form.modules) == 4


def test_an_adapter_trained_beside_another_keeps_its_own(tmp_path):
    """Two adapters on one live model share PEFT's wrappers."""
    tenant = tenant_of("mixtral")
    tenant.add_adapter("second", copy.deepcopy(tenant.peft_config["default"]))
    tenant.set_adapter("second")
    form = form_of(tenant, mixture_of("mixtral"))
    for path, wrapper in wrappers(tenant).items():
        assert relative(product(form.modules[path]), wrapper.double().get_delta_weight("second")) < 1e-14


@torch.no_grad()
def test_experts_that_were_modules_are_refused_with_a_remedy_that_helps(tmp_path):
    """A checkpoint of transformers 4, where each expert of Qwen3-MoE was three linear modules."""
    base = mixture_of("qwen3-moe")
    folder = save(tenant_of("qwen3-moe", 0, target_modules=["q_proj"], target_parameters=None), tmp_path / "old")
    generator = torch.Generator().manual_seed(3)
    sizes = {"gate_proj": (32, 24), "up_proj": (32, 24), "down_proj": (24, 32)}
    exact = in_double(tenant_of("qwen3-moe", 0, target_modules=["q_proj"], target_parameters=None))

    def change(tensors):
        for layer in range(2):
            experts = exact.get_base_model().model.layers[layer].mlp.experts
            for expert in range(5):
                for name, (width, height) in sizes.items():
                    a = 0.2 * torch.randn(4, width, generator=generator)
                    b = 0.2 * torch.randn(height, 4, generator=generator)
                    prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                    tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
                    weight = experts.down_proj if name == "down_proj" else experts.gate_up_proj
                    begin = height if name == "up_proj" else 0
                    weight.data[expert, begin : begin + height] += 6 / 4 * b.double() @ a.double()

    edit_tensors(folder, change)
    edit_config(folder, target_modules=["q_proj", *sizes])
    with pytest.raises(UnsupportedMethodError, match=r"layers\.0\.mlp\.experts\..*Load it with PEFT .* save it again"):
        form_of(folder, base)
    edit_config(folder, use_rslora=True)
    with pytest.raises(UnsupportedMethodError, match="Train it again"):
        form_of(folder, base)
    edit_config(folder, use_rslora=False)
    save(PeftModel.from_pretrained(copy.deepcopy(base), folder), tmp_path / "new")
    model = MultiLoraModel(copy.deepcopy(base))
    model.load_adapter("tenant", tmp_path / "new")
    inputs = MIXTURES["qwen3-moe"].inputs(2)
    mixed = model(**inputs, adapter_ids=["tenant", None]).logits
    assert relative(mixed[0], exact(**inputs).logits[0]) <= 2e-5
