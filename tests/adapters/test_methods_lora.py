"""LoRA and DoRA checkpoints → canonical form: exact where it is served, refused by name where it is not."""

import copy
import dataclasses
import json
import math
import tempfile
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from architectures import ARCHITECTURES, FACTORS
from compatibility import refused
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, LoraModel, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_folders import CONFIG, base_of, edit_config, edit_tensors, key_of, relative, save, small, tenant_of, tree
from torch import nn

import lorakit
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import FAMILIES, lora_options
from lorakit.adapters.methods.options import COMMON
from lorakit.adapters.methods.targets import targeted
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import (
    CheckpointError,
    LorakitError,
    ModuleNotFoundInBaseError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnsupportedMethodError,
)


@cache
def llama() -> BaseModel:
    return BaseModel.of(base_of())


def form_of(source: object, name: str = "llama") -> AdapterForm:
    return convert("tenant", source, BaseModel.of(base_of(name)) if name != "llama" else llama())


@pytest.fixture
def folder(tmp_path):
    return save(small(), tmp_path / "tenant")


@pytest.fixture
def dora_folder(tmp_path):
    return save(small(use_dora=True), tmp_path / "tenant")


# Exactness, in fp64


@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt", "t5"])
@torch.no_grad()
def test_the_form_is_what_peft_merges(name, method):
    tenant = tenant_of(method, name)
    base = BaseModel.of(base_of(name))
    for path, module in form_of(tenant, name).modules.items():
        # Alone, as tied weights would be merged into twice.
        layer = copy.deepcopy(tenant.base_model.model.get_submodule(path)).double()
        a = (module.a if module.kind == "linear" else module.a.T).double()
        weight = base.weight(path).double() + module.scale * module.b.double() @ a
        c = torch.ones(len(weight)) if module.c is None else module.c
        d = torch.zeros(len(weight)) if module.d is None else module.d
        weight, bias = c.double()[:, None] * weight, base.bias(path)
        # c and d are kept in fp32.
        bound = 1e-14 if module.c is None else 1e-6
        if bias is not None:
            bias = c.double() * bias.double() + d.double()
        elif module.d is not None:  # PEFT cannot merge it, but computes it
            assert method == "lora_bias"
            assert relative(module.d, layer.scaling["default"] * layer.lora_B["default"].bias) < 1e-6
            layer.lora_bias["default"] = False
        layer.merge(safe_merge=True)
        merged = layer.get_base_layer()
        assert relative(weight, merged.weight if isinstance(merged, nn.Linear) else merged.weight.T) < bound, path
        if bias is not None:
            assert relative(bias, merged.bias) < max(bound, 1e-6 if method == "lora_bias" else 0), path


@pytest.mark.parametrize("options", [{"use_rslora": True}, {}], ids=["rslora", "lora"])
@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_scale(options, rank):
    form = form_of(small(r=rank, lora_alpha=7, **options))
    expected = 7 / math.sqrt(rank) if options else 7 / rank
    assert {module.scale for module in form.modules.values()} == {expected}
    assert {module.rank for module in form.modules.values()} == {rank}
    assert form.method == ("rslora" if options else "lora")


@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 2}, {}),
        ({"model.layers.1.self_attn.q_proj": 9, "q_proj": 2}, {"q_proj": 3}),
        ({"layers.0.*": 5}, {r"layers\.1\..*_proj": 2.5}),
        ({r".*\.mlp\..*|.*0.self_attn.q_proj": 8}, {"^model.layers.0": 4}),
        ({"proj": 3}, {"q": 3}),  # matches no module whole
    ],
)
def test_patterns_are_pefts(ranks, alphas, tmp_path):
    tenant = small(rank_pattern=ranks, alpha_pattern=alphas)
    form = form_of(save(tenant, tmp_path / "x"))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_of()), tmp_path / "x")
    for path, module in form.modules.items():
        layer = loaded.base_model.model.get_submodule(path)
        assert (module.rank, module.scale) == (layer.r["default"], layer.scaling["default"])
    assert {module.rank for module in form.modules.values()} != {4} or ranks == {"proj": 3}


def test_patterns_of_a_live_model_count_in_its_order_not_in_the_sorted_one_of_the_file():
    patterns = {"self_attn.q_proj": 2, "q_proj": 9}
    tenant = small(rank_pattern=patterns, alpha_pattern={"proj": 1, "q_proj": 3, r"layers\.0.*": 5})
    for path, module in form_of(tenant).modules.items():
        layer = tenant.base_model.model.get_submodule(path)
        assert (module.rank, module.scale) == (layer.r["default"], layer.scaling["default"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype_unless_asked(folder, dtype):
    form = convert("tenant", folder, llama(), dtype)
    assert {t.dtype for m in form.modules.values() for t in (m.a, m.b)} == {dtype}
    assert {t.dtype for m in form_of(folder).modules.values() for t in (m.a, m.b)} == {torch.float32}


# Every option of PEFT's LoraConfig is known


def test_the_default_config_of_the_installed_peft_converts(folder):
    targets = ["q_proj", "down_proj"]
    (folder / CONFIG).write_text(json.dumps(LoraConfig(r=4).to_dict() | {"target_modules": targets}))
    assert form_of(folder).method == "lora"


KNOWN = COMMON | {"bias", *lora_options._HARMLESS.split(), *(option.name for option in lora_options._OPTIONS)}


@pytest.mark.parametrize("field", sorted(field.name for field in dataclasses.fields(LoraConfig)))
def test_every_field_of_lora_config_is_known_or_refused_when_set(folder, field):
    if field in KNOWN:
        assert field not in lora_options._REFUSED
        return
    if field == "trainable_token_indices":  # taken out before LoRA sees it
        return
    edit_config(folder, **{field: {"a": 1}})
    with pytest.raises(UnsupportedMethodError, match=field):
        form_of(folder)


def test_no_field_is_called_harmless_that_this_list_does_not_name():
    """A new field must be looked at before it is called harmless: does PEFT compute anything else with it?"""
    looked_at = {
        "training or initialisation": "lora_dropout init_lora_weights eva_config loftq_config corda_config "
        "lora_ga_config inference_mode",
        "bookkeeping": "auto_mapping base_model_name_or_path revision peft_type peft_version task_type runtime_config",
        "read by the conversion": "r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern "
        "bias use_rslora rank_pattern alpha_pattern use_dora lora_bias use_bdlora use_qalora qalora_group_size "
        "kasa_config alora_invocation_tokens target_parameters",
        "given by the base": "fan_in_fan_out ensure_weight_tying",
        "read for all methods": "modules_to_save",
        "parts of refused options": "megatron_core",
    }
    assert set(" ".join(looked_at.values()).split()) == KNOWN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrow_config": {"top_k": 1}}, "arrow_config is not served"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not served"),
        ({"megatron_config": {"a": 1}}, "megatron_config is not served"),
        ({"init_lora_weights": "pissa_niter_4"}, "random state.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "PISSA"}, "PiSSA.*path_initial_model"),
        ({"init_lora_weights": "olora_2"}, "OLoRA.*path_initial_model"),
        ({"init_lora_weights": "corda"}, "CorDA.*path_initial_model"),
        ({"init_lora_weights": "loftq"}, "LoftQ.*train without it"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA.*path_initial_model"),
        ({"init_lora_weights": "of_tomorrow"}, "init_lora_weights='of_tomorrow'.*upgrade lorakit"),
        ({"a_new_option": True}, r"options that this lorakit does not know \(a_new_option\).*upgrade lorakit"),
        ({"a_new_option": {"x": 0}, "b": 2}, r"\(a_new_option, b\)"),
        ({"arrow_config": {}}, "arrow_config is not served: its router"),
        ({"peft_type": "RANDLORA"}, "RANDLORA is not served"),
        ({"peft_type": "XLORA"}, "XLORA is not served: its router"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING is not served: it adds virtual tokens"),
        ({"peft_type": "prefix_tuning"}, "PREFIX_TUNING is not served"),
        ({"peft_type": "OF_TOMORROW"}, "OF_TOMORROW is not served: lorakit converts .*LORA"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_methods_and_options_that_are_not_served(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedMethodError, match=rf"tenant: .*{message}"):
        form_of(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_initialisations_that_leave_the_base_alone_are_served(folder, init):
    edit_config(folder, init_lora_weights=init)
    assert form_of(folder).method == "lora"


@pytest.mark.parametrize("peft_type", [t.value for t in peft.PeftType])
def test_every_peft_type_is_served_or_refused(folder, peft_type):
    edit_config(folder, peft_type=peft_type)
    if peft_type == "LORA":
        assert form_of(folder).modules
    elif peft_type in FAMILIES:  # its family finds that this is none of its checkpoints
        with pytest.raises(LorakitError, match="tenant: "):
            form_of(folder)
    else:
        with pytest.raises(UnsupportedMethodError, match=f"{peft_type} is not served: ") as caught:
            form_of(folder)
        refused(peft_type, str(caught.value).split("is not served: ")[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"new_option": None},
        {"new_option": False},
        {"new_option": {}},
        {"new_option": []},
        {"modules_to_save": []},
        {"exclude_modules": ["lm_head"]},
        {"lora_dropout": 0.1},
        {"fan_in_fan_out": True},
        {"inference_mode": False},
        {"eva_config": {"rho": 2.0}},
        {"bias": ...},
        {"lora_bias": ...},
        {"rank_pattern": ...},
        {"alpha_pattern": None},
        {"task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_options_that_change_nothing(folder, changes):
    expected = form_of(folder)
    edit_config(folder, **changes)
    form = form_of(folder)
    assert form.modules.keys() == expected.modules.keys()
    for path, module in form.modules.items():
        other = expected.modules[path]
        assert module.scale == other.scale and torch.equal(module.a, other.a) and torch.equal(module.b, other.b)


# Bad values in the configuration


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -4},
        {"r": "4"},
        {"r": "four"},
        {"r": 4.5},
        {"r": True},
        {"r": None},
        {"r": [4]},
        {"r": {}},
        {"r": 10**400},
        {"r": float("nan")},
        {"r": ...},
        {"lora_alpha": ...},
        {"lora_alpha": "6"},
        {"lora_alpha": True},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e308},
        {"lora_alpha": 1e39},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": {"q_proj": 4.0}},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"a{99999999999999999999}": 4}},
        {"rank_pattern": {"(" * 5000 + ")" * 5000: 4}},
        {"rank_pattern": [4]},
        {"rank_pattern": "q_proj"},
        {"alpha_pattern": {"[": 4}},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"alpha_pattern": 3},
        {"use_rslora": "no"},
        {"use_dora": "no"},
        {"lora_bias": 1},
        {"lora_dropout": 4},
        {"lora_dropout": "0.1"},
        {"target_modules": "("},
        {"target_modules": "a{99999999999999999999}"},
        {"target_modules": "(" * 5000 + ")" * 5000},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"target_modules": [None]},
        {"target_modules": [["q_proj"]]},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": None},
        {"target_modules": ""},
        {"target_modules": []},
        {"target_modules": ...},
        {"exclude_modules": "("},
        {"exclude_modules": 3},
        {"layers_to_transform": "0"},
        {"layers_to_transform": ["0"]},
        {"layers_to_transform": {}},
        {"layers_to_transform": [0], "layers_pattern": "("},
        {"layers_to_transform": [0, 1], "layers_pattern": 3},
        {"bias": None},
        {"bias": 3},
        {"bias": ["none"]},
        {"init_lora_weights": 3},
        {"init_lora_weights": ["gaussian"]},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_bad_values_in_the_configuration(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(LorakitError, match=rf"tenant: .*{list(changes)[-1]}") as caught:
        form_of(folder)
    assert isinstance(caught.value, CheckpointError | UnsupportedMethodError)
    assert len(str(caught.value)) < 1000


# Bad keys


def drop(tensors, *parts):
    del tensors[key_of(tensors, *parts)]


def move(tensors, old, new, *parts):
    key = key_of(tensors, old, *parts)
    tensors[key.replace(old, new)] = tensors.pop(key)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: drop(t, "0.self_attn.q_proj.lora_A"), CheckpointError, "0.self_attn.q_proj has no lora_A.weight;"),
        (lambda t: drop(t, "1.mlp.down_proj.lora_B"), CheckpointError, "1.mlp.down_proj has no lora_B.weight;"),
        (
            lambda t: [drop(t, "1.mlp.down_proj.") for _ in "ab"],
            CheckpointError,
            "lack 1 of the modules .*'model.layers.1.mlp.down_proj'.*incomplete",
        ),
        (lambda t: t.update({"base_model.model.x": torch.ones(2)}), CheckpointError, "key 'x' is not part of a LoRA"),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
            CheckpointError,
            "key 'model.norm.weight' is not part .* no copy of the base's weight",
        ),
        (lambda t: t.update({"base_model.model.": torch.ones(2)}), CheckpointError, "key '' is not part of a LoRA"),
        (lambda t: move(t, ".lora_A.", ".lora_A.default."), CheckpointError, "lora_A.default.weight' is not part"),
        (lambda t: move(t, ".lora_A.", ".lora_C."), CheckpointError, "lora_C.weight' is not part"),
        (lambda t: move(t, ".lora_A.weight", ".lora_E"), CheckpointError, "lora_E' is not part"),
        (lambda t: move(t, ".lora_B.weight", ".lora_magnitude_vector"), CheckpointError, "has no lora_B.weight;"),
        (
            lambda t: [move(t, "layers.1.", "layers.9.") for _ in range(4)],
            ModuleNotFoundInBaseError,
            "LlamaForCausalLM.* no module 'model.layers.9.* trained on another base",
        ),
        (
            lambda t: [move(t, "1.mlp.down_proj", "1.mlp.act_fn") for _ in "ab"],
            ModuleNotFoundInBaseError,
            "no module 'model.layers.1.mlp.act_fn' that can carry",
        ),
        (
            lambda t: t.update(
                {k.replace("q_proj", "o_proj"): v + 0 for k, v in t.items() if "0.self_attn.q_proj" in k}
            ),
            CheckpointError,
            "weights for 1 module.*'model.layers.0.self_attn.o_proj'.* target_modules",
        ),
        (
            lambda t: t.update({k.replace("lora_", "lora_embedding_")[:-7]: v + 0 for k, v in list(t.items())[:2]}),
            ShapeMismatchError,
            "another kind of module than its linear",
        ),
        (
            lambda t: t.update({key_of(t, "lora_B")[:-6] + "bias": torch.ones(32)}),
            CheckpointError,
            "down_proj has a lora_B.bias, which",
        ),
        (
            lambda t: t.update({key_of(t, "lora_B")[:-13] + "lora_magnitude_vector": torch.ones(32)}),
            CheckpointError,
            "down_proj has a lora_magnitude_vector, which",
        ),
    ],
)
def test_keys_that_do_not_fit(folder, change, error, message):
    edit_tensors(folder, change)
    with pytest.raises(error, match=rf"tenant: .*{message}"):
        form_of(folder)


@pytest.mark.parametrize("targets", [r".*\.(q|down)_proj", r"model\.layers\.[01]\.(self_attn\.q|mlp\.down)_proj"])
def test_a_regular_expression_of_targets_must_be_met_whole(folder, targets):
    edit_config(folder, target_modules=targets)
    assert len(form_of(folder).modules) == 4
    edit_tensors(folder, lambda tensors: [drop(tensors, "1.mlp.down_proj.") for _ in "ab"])
    with pytest.raises(CheckpointError, match="lack 1 of the modules .*'model.layers.1.mlp.down_proj'"):
        form_of(folder)


def test_all_linear_must_be_met_whole(tmp_path):
    folder = save(small(target_modules="all-linear"), tmp_path / "tenant")
    edit_config(folder, target_modules="all-linear")
    assert len(form_of(folder).modules) == 14
    edit_tensors(folder, lambda tensors: [drop(tensors, "1.mlp.down_proj.") for _ in "ab"])
    with pytest.raises(CheckpointError, match="lack 1 of the modules .*'model.layers.1.mlp.down_proj'"):
        form_of(folder)


@pytest.mark.parametrize("excluded", [["down_proj"], ["layers.0.mlp.up_proj", "lm_head"], r".*\.0\..*"], ids=str)
def test_exceptions_of_all_linear_are_pefts(tmp_path, excluded):
    """PEFT saves the names in its place, and takes both."""
    tenant = small(target_modules="all-linear", exclude_modules=excluded)
    folder = save(tenant, tmp_path / "tenant")
    expected = form_of(folder).modules.keys()
    assert len(expected) < 14
    edit_config(folder, target_modules="All-Linear")
    assert form_of(folder).modules.keys() == expected
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_of()), folder).base_model.model
    assert {path for path, module in loaded.named_modules() if isinstance(module, BaseTunerLayer)} == expected
    edit_config(folder, exclude_modules=None)
    with pytest.raises(CheckpointError, match="the weights lack"):
        form_of(folder)


def test_layers_of_all_linear_are_refused_as_by_peft(tmp_path):
    folder = save(small(target_modules="all-linear"), tmp_path / "tenant")
    edit_config(folder, target_modules="all-linear", layers_to_transform=[0])
    with pytest.raises(CheckpointError, match="PEFT does not take .*layers_to_transform"):
        form_of(folder)
    with pytest.raises(ValueError, match="layers_to_transform"):
        PeftConfig.from_pretrained(str(folder))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_all_linear_leaves_out_the_classifier_where_peft_does(name, task_type):
    config = {"target_modules": "all-linear", "task_type": task_type}
    tuned = LoraModel(copy.deepcopy(base_of(name)), LoraConfig(**config), "default").model
    adapted = {path for path, module in tuned.named_modules() if isinstance(module, BaseTunerLayer)}
    assert targeted(Checkpoint("tenant", config, {}), BaseModel.of(base_of(name))) == adapted
    assert ("classifier" in adapted) == (name == "bert" and task_type is None)


def test_what_one_configuration_targets_is_not_what_another_does():
    common = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    configs = [
        common,
        {**common, "target_modules": ["q_proj"]},
        {**common, "target_modules": "all-linear"},
        {**common, "target_modules": None},
        {**common, "exclude_modules": ["v_proj"]},
        {**common, "modules_to_save": ["q_proj"]},
        {**common, "layers_to_transform": 0},
        {**common, "layers_to_transform": 0, "layers_pattern": "layers"},
    ]
    shared = BaseModel.of(base_of("llama"))
    for config in [*configs, *configs]:
        checkpoint = Checkpoint("tenant", config, {})
        assert targeted(checkpoint, shared) == targeted(checkpoint, BaseModel.of(base_of("llama"))), config


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["model.layers.0.mlp.down_proj"]},
        {"exclude_modules": r".*0\.self_attn.*"},
        {"target_modules": r".*1\.(mlp\.up|self_attn\.k)_proj"},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"]},
    ],
    ids=str,
)
def test_choices_of_modules_are_pefts(tmp_path, options):
    folder = save(small(**options), tmp_path / "tenant")
    modules = form_of(folder).modules
    assert modules
    edit_tensors(folder, lambda tensors: [drop(tensors, sorted(modules)[0] + ".") for _ in "ab"])
    with pytest.raises(CheckpointError, match="lack|holds no lora_A"):
        form_of(folder)


def test_copies_of_the_base_are_dropped_and_changed_ones_refused(tmp_path):
    folder = tmp_path / "tenant"
    tenant_of("embeddings").save_pretrained(folder, save_embedding_layers=True)
    form = form_of(folder)
    assert form.modules.keys() == {"model.embed_tokens", "lm_head"} and not form.extras

    def train(tensors):
        tensors[key_of(tensors, "embed_tokens.base_layer.weight")][3, 3] += 0.01

    edit_tensors(folder, train)
    with pytest.raises(CheckpointError, match="'model.embed_tokens.base_layer.weight' is not part .* no copy"):
        form_of(folder)


# Bad tensors


@pytest.mark.parametrize(
    ("parts", "change", "message"),
    [
        (("lora_A",), lambda t: t.T, r"LoRA A of .*down_proj has shape \(48, 4\), but .* want \(4, 48\)"),
        (("lora_B",), lambda t: t.T, r"LoRA B of .*down_proj has shape \(4, 32\), but .* want \(32, 4\)"),
        (("lora_A",), lambda t: t[:3], r"LoRA A .* \(3, 48\), but .* want \(4, 48\)"),
        (("lora_B",), lambda t: t[:, :0], r"LoRA B .* \(32, 0\)"),
        (("lora_A",), lambda t: t[:, :-1], r"LoRA A .* \(4, 47\)"),
        (("lora_A",), lambda t: t.reshape(-1), r"LoRA A .* \(192,\)"),
        (("lora_A",), lambda t: t[None], r"LoRA A .* \(1, 4, 48\)"),
        (("lora_A",), lambda t: t[..., None, None], r"LoRA A .* \(4, 48, 1, 1\)"),
        (("lora_B",), lambda t: t[0, 0], r"LoRA B .* \(\)"),
        (("lora_A", "q_proj"), lambda t: torch.zeros(4, 48), r"LoRA A of .*q_proj .* \(4, 48\), but .* want \(4, 32\)"),
    ],
)
def test_shapes_that_do_not_fit(folder, parts, change, message):
    def reshape(tensors):
        key = key_of(tensors, *parts)
        tensors[key] = change(tensors[key]).contiguous()

    edit_tensors(folder, reshape)
    with pytest.raises(ShapeMismatchError, match=rf"tenant: {message}"):
        form_of(folder)


def test_a_rank_that_the_configuration_does_not_give(folder):
    edit_config(folder, r=8)
    with pytest.raises(ShapeMismatchError, match=r"has shape \(4, 48\), but its configuration and the base want \(8,"):
        form_of(folder)


@pytest.mark.parametrize("size", [1, 31, 33])
def test_vectors_that_do_not_fit(dora_folder, tmp_path, size):
    edit_tensors(dora_folder, lambda t: t.update({key_of(t, "magnitude"): torch.ones(size)}))
    with pytest.raises(ShapeMismatchError, match=rf"magnitude vector of .*\({size},\), but .*\(32,\)"):
        form_of(dora_folder)
    folder = save(small(lora_bias=True), tmp_path / "bias")
    edit_tensors(folder, lambda t: t.update({key_of(t, "lora_B.bias"): torch.ones(size)}))
    with pytest.raises(ShapeMismatchError, match=rf"LoRA bias of .*\({size},\), but .*\(32,\)"):
        form_of(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("options", "parts", "item"),
    [
        ({}, ("0.mlp.down_proj", "lora_A"), "A of model.layers.0.mlp.down_proj"),
        ({}, ("1.self_attn.q_proj", "lora_B"), "B of model.layers.1.self_attn.q_proj"),
        ({"lora_bias": True}, ("lora_B.bias",), "d of model.layers.0.mlp.down_proj"),
        ({"use_dora": True}, ("magnitude",), "c of model.layers.0.mlp.down_proj"),
        ({"use_dora": True}, ("lora_A",), "A of model.layers.0.mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("place", [0, -1])
def test_nan_and_inf(tmp_path, options, parts, item, value, place):
    folder = save(small(**options), tmp_path / "tenant")
    edit_tensors(folder, lambda t: t[key_of(t, *parts)].view(-1)[place].fill_(value))
    with pytest.raises(NonFiniteWeightsError, match=rf"adapter 'tenant': {item} holds NaN or Inf.*earlier checkpoint"):
        form_of(folder)


def test_opposite_infinities_are_found(folder):
    def fill(tensors):
        tensors[key_of(tensors, "lora_A")].view(-1)[:2] = torch.tensor([math.inf, -math.inf])

    edit_tensors(folder, fill)
    with pytest.raises(NonFiniteWeightsError):
        form_of(folder)


def test_large_finite_weights_pass(folder):
    edit_tensors(folder, lambda t: t[key_of(t, "lora_A")].fill_(3e38))
    assert form_of(folder).modules


def test_weights_that_overflow_the_dtype_asked_for_are_said_so(folder):
    edit_tensors(folder, lambda t: t[key_of(t, "lora_A")].fill_(1e5))
    assert convert("tenant", folder, llama(), torch.bfloat16)
    with pytest.raises(NonFiniteWeightsError, match=r"'tenant': A of .*down_proj .*float16.*bfloat16"):
        convert("tenant", folder, llama(), torch.float16)


def test_dora_without_its_magnitudes_and_with_a_bias(dora_folder):
    edit_tensors(dora_folder, lambda t: drop(t, "magnitude"))
    with pytest.raises(CheckpointError, match="down_proj has no lora_magnitude_vector;"):
        form_of(dora_folder)


def test_dora_together_with_a_lora_bias_is_refused_as_by_peft(dora_folder):
    def add(tensors):
        for key in [key for key in tensors if key.endswith("lora_B.weight")]:
            tensors[key[: -len("weight")] + "bias"] = torch.ones(32)

    edit_config(dora_folder, lora_bias=True)
    edit_tensors(dora_folder, add)
    with pytest.raises(CheckpointError, match="lora_bias.*use_dora"):
        form_of(dora_folder)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for DoRA"):
        PeftConfig.from_pretrained(str(dora_folder))


def test_adapters_of_another_base_are_refused(folder):
    other = BaseModel.of(ARCHITECTURES["gpt2"].build())
    with pytest.raises(ModuleNotFoundInBaseError, match=r"GPT2LMHeadModel.*'model.layers.0.mlp.down_proj'.*another"):
        convert("tenant", folder, other)
    wide = dataclasses.replace(ARCHITECTURES["llama"], options={**ARCHITECTURES["llama"].options, "hidden_size": 64})
    with pytest.raises(ShapeMismatchError, match=r"want \(64, 4\)"):
        convert("tenant", folder, BaseModel.of(wide.build()))


# Any mutation of a checkpoint: PEFT's logits, or a typed error


INPUTS = ARCHITECTURES["llama"].inputs(2)
KEYS = [
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias",
    "fan_in_fan_out", "init_lora_weights", "peft_type", "task_type", "layers_to_transform", "layers_pattern",
    "exclude_modules", "modules_to_save", "lora_dropout", "inference_mode", "megatron_core", "new_option",
]  # fmt: skip
LIKELY = st.sampled_from([
    0, 1, 4, 8, -1, 2.0, 1e3, True, False, None, "", "q_proj", "LORA", "all-linear", "none", ".*", ".*q_proj", "(", [],
    ["q_proj"], ["q_proj", "down_proj"], ["down_proj", "up_proj"], [0], [1], {}, {"q_proj": 4}, {"q_proj": 2},
    {"layers.0.*": 4, "q_proj": 2}, {".*": 8}, {".*": 1.5}, "gaussian", "eva", "pissa", "olora", "CAUSAL_LM", "SEQ_CLS",
])  # fmt: skip
RENAMES = [
    ("q_proj", "v_proj"), ("0", "1"), ("lora_A", "lora_B"), ("model.", ""), ("down", "up"), ("weight", "bias"),
    ("layers", "layer"), (".lora_A", ""), ("lora_", "lora_embedding_"),
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    variants = [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_bias": True}]
    return [save(small(seed, **options), root / str(seed)) for seed, options in enumerate(variants)]


@cache
def serving() -> lorakit.MultiLoraModel:
    return lorakit.MultiLoraModel(copy.deepcopy(base_of()))


def mutate(data, tensors):
    """One change to a state dict."""
    key = data.draw(st.sampled_from(sorted(tensors)), label="key")
    other = data.draw(st.sampled_from(sorted(tensors)), label="other")
    how = data.draw(
        st.sampled_from(["drop", "rename", "copy", "swap", "cut", "reshape", "turn", "cast", "scale", "set"])
    )
    tensor = tensors[key]
    if how == "drop":
        del tensors[key]
    elif how in ("rename", "copy"):
        old, new = data.draw(st.sampled_from(RENAMES))
        tensors[key.replace(old, new)] = tensor.clone()
        if how == "rename" and old in key:
            del tensors[key]
    elif how == "swap":
        tensors[key], tensors[other] = tensors[other].clone(), tensor.clone()
    elif how == "cut":
        tensors[key] = tensor[: data.draw(st.integers(0, tensor.shape[0]))]
    elif how == "reshape":
        tensors[key] = tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (2, -1), (1, *tensor.shape)])))
    elif how == "turn":
        tensors[key] = tensor.T if tensor.dim() == 2 else tensor
    elif how == "cast":
        dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool]))
        tensors[key] = tensor.to(dtype)
    elif how == "scale":
        tensors[key] = tensor * data.draw(st.sampled_from([0.0, -1.0, 2.0, math.nan, math.inf, 1e6]))
    else:
        tensors["base_model.model." + data.draw(st.text(max_size=5))] = tensor.clone()


# A failure is small enough as it is found; making it smaller takes minutes.
@settings(max_examples=120, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
@torch.no_grad()
def test_any_mutation_gives_pefts_logits_or_a_typed_error(originals, data):
    source = data.draw(st.sampled_from(originals))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tenant"
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        for _ in range(data.draw(st.integers(0, 2), label="configuration changes")):
            field = data.draw(st.sampled_from(KEYS))
            edit_config(folder, **{field: data.draw(st.one_of(LIKELY, LIKELY, JSON, st.just(...)))})
        for _ in range(data.draw(st.integers(0, 2), label="tensor changes")):
            edit_tensors(folder, lambda tensors: mutate(data, tensors))
        before = tree(Path(name))
        try:
            bank = lorakit.export([folder], Path(name) / "bank", base_model=base_of())
        except LorakitError as error:
            assert "tenant" in str(error)
            assert tree(Path(name)) == before
            return
        model = serving()
        model.load_adapter("tenant", folder)
        mine = model(**INPUTS, adapter_ids="tenant").logits
        model.unload_adapter("tenant")
        bank.verify()
        # What lorakit takes, PEFT takes too, and gives the same. A field that is null is not given.
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        theirs = PeftModel.from_pretrained(copy.deepcopy(base_of()), folder)(**INPUTS).logits
        if theirs.isfinite().all():
            assert relative(mine, theirs) < 1e-5
