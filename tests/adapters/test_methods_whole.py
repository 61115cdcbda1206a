"""Whole tensors beside an adapter: saved modules, norms and biases of its own, whatever its method."""

import json

import pytest
import torch
from architectures import ARCHITECTURES
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig
from peft_folders import base_of, edit_config, edit_tensors, key_of, relative, save
from tenants import check_exact, form_of, tenant_with

from lorakit import AdapterBank, MultiLoraModel, export
from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

SAVED = {
    "an output layer": ("llama", ["lm_head"]),
    "a tied output layer": ("llama-tied", ["lm_head"]),
    "an embedding": ("llama", ["embed_tokens"]),
    "an embedding and its output layer": ("llama", ["embed_tokens", "lm_head"]),
    "both, tied": ("llama-tied", ["embed_tokens", "lm_head"]),
    "an embedding that is scaled": ("gemma3", ["embed_tokens"]),
    "norms": ("llama", ["norm", "input_layernorm"]),
    "norms with a bias": ("gpt2", ["ln_1", "ln_2", "ln_f"]),
    "norms that add one to their weight": ("gemma3", ["norm", "q_norm", "k_norm"]),
    "norms of heads": ("qwen3", ["q_norm", "k_norm"]),
    "norms of an encoder-decoder": ("t5", ["layer_norm"]),
    "a classifier": ("bert", ["classifier"]),
    "a module of many": ("bert", ["pooler", "classifier"]),
    "a linear with a bias": ("llama", ["k_proj"]),
    "a Conv1D": ("gpt2", ["c_fc"]),
    "positions": ("opt", ["embed_tokens", "final_layer_norm"]),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_modules_are_exact(name, tmp_path):
    architecture, modules = SAVED[name]
    target = {"gpt2": "c_attn", "bert": "query", "t5": "q"}.get(architecture, "q_proj")
    config = LoraConfig(target_modules=[target], modules_to_save=modules, r=4)
    form = check_exact(tenant_with(config, architecture), tmp_path / "a", architecture)
    assert len(form.modules) > len(base_of(architecture).config.to_dict().get("layers", [])) + 1


CONFIGS = {
    "dora": LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True),
    "lora_bias": LoraConfig(target_modules=["q_proj"], lora_bias=True),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "vera": VeraConfig(target_modules=["q_proj"], r=8),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_takes_them(method, tmp_path):
    config = CONFIGS[method]
    config.modules_to_save = ["norm", "lm_head"]
    check_exact(tenant_with(config), tmp_path / "a")


BIASES = {
    "all of a model": ("gpt2", LoraConfig(target_modules=["c_attn"], bias="all")),
    "of its modules": ("gpt2", LoraConfig(target_modules=["c_attn", "c_fc"], bias="lora_only")),
    "all, also the norms'": ("bert", LoraConfig(target_modules=["query"], bias="all")),
    "beside dora": ("llama", LoraConfig(target_modules=["q_proj"], bias="all", use_dora=True)),
    "beside a bias that the adapter adds": ("llama", LoraConfig(target_modules=["q_proj"], bias="all", lora_bias=True)),
    "beside adalora": ("llama", AdaLoraConfig(target_modules=["q_proj"], bias="all", total_step=10, init_r=4)),
    "with saved modules": ("opt", LoraConfig(target_modules=["q_proj"], bias="all", modules_to_save=["fc1"])),
    "of a model that has none": ("mistral", LoraConfig(target_modules=["q_proj"], bias="all")),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_exact(name, tmp_path):
    architecture, config = BIASES[name]
    check_exact(tenant_with(config, architecture), tmp_path / "a", architecture)


@torch.no_grad()
def test_one_batch_holds_heads_of_several_tenants(tmp_path):
    base = base_of("bert")
    configs = {
        "head": LoraConfig(target_modules=["query"], modules_to_save=["classifier"]),
        "other": LoraConfig(target_modules=["key"], modules_to_save=["classifier"], use_dora=True),
        "biases": LoraConfig(target_modules=["value"], bias="all"),
        "plain": LoraConfig(target_modules=["dense", "classifier"]),
    }
    tenants = {name: tenant_with(config, "bert", seed) for seed, (name, config) in enumerate(configs.items())}
    bank = export(
        {name: save(tenant, tmp_path / name) for name, tenant in tenants.items()}, tmp_path / "bank", base_model=base
    )
    model = MultiLoraModel(base_of("bert"), AdapterBank.open(bank.path))
    ids = ["head", None, "other", "plain", "head", "biases", None]
    inputs = ARCHITECTURES["bert"].inputs(len(ids))
    mixed = model(**inputs, adapter_ids=ids).logits
    for row, name in enumerate(ids):
        alone = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        expected = (tenants[name] if name else base)(**alone).logits[0]
        assert relative(mixed[row], expected) <= 1e-5
    bank.verify()


def test_a_whole_weight_is_stored_once_and_in_its_own_dtype_given_back(tmp_path):
    tenant = tenant_with(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    folder = save(tenant, tmp_path / "a")
    head = key_of(_tensors(folder), "lm_head")
    edit_tensors(folder, lambda tensors: tensors.update({head: tensors[head].bfloat16()}))
    bank = export({"a": folder}, tmp_path / "bank", base_model=base_of())
    stored = sum(tensor.numel() * 4 for tensor in _tensors(folder).values())
    assert bank["a"].stored_nbytes <= stored + 1024
    given = _tensors(bank.export_peft("a", tmp_path / "out"))
    expected = _tensors(folder)
    assert given.keys() == expected.keys() and given[head].dtype == torch.bfloat16
    assert all(torch.equal(given[key], tensor) for key, tensor in expected.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]


@torch.no_grad()
def test_a_base_that_is_nan_there_does_not_reach_a_whole_weights_rows():
    base = ARCHITECTURES["llama"].build()
    tenant = tenant_with(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model = MultiLoraModel(base)
    model.load_adapter("tenant", tenant)
    base.lm_head.weight.fill_(float("nan"))
    mixed = model(**ARCHITECTURES["llama"].inputs(2), adapter_ids=["tenant", None]).logits
    assert mixed[0].isfinite().all() and mixed[1].isnan().all()


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


REFUSED = {
    "modules_to_save that are no list": (CheckpointError, "list of modules", {"modules_to_save": "lm_head"}, None),
    "modules_to_save that are no names": (CheckpointError, "list of modules", {"modules_to_save": [3]}, None),
    "a bias of no kind": (CheckpointError, "bias is 'some'", {"bias": "some"}, None),
    "a bias that is no word": (CheckpointError, "bias is 3", {"bias": 3}, None),
    "biases that are not there": (CheckpointError, "does not hold it", {"bias": "all"}, None),
    "a module that is not there": (CheckpointError, "does not hold it", {"modules_to_save": ["lm_head", "norm"]}, None),
    "a module that is not named": (CheckpointError, "no copy", {"modules_to_save": None}, None),
    "another shape": (ShapeMismatchError, "shape", {}, lambda t: t.update({_HEAD: t[_HEAD][:-1]})),
}
_HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name, tmp_path):
    error, match, config, tensors = REFUSED[name]
    folder = save(tenant_with(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])), tmp_path / "a")
    edit_config(folder, **config)
    if tensors:
        edit_tensors(folder, tensors)
    with pytest.raises(error, match=match):
        form_of(folder)


def test_a_norm_that_the_base_has_as_zero_is_refused(tmp_path):
    tenant = tenant_with(LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    base = ARCHITECTURES["llama"].build()
    with torch.no_grad():
        base.model.norm.weight[3] = 0
    with pytest.raises(UnsupportedMethodError, match=r"model\.norm has a zero in channel 3"):
        MultiLoraModel(base).load_adapter("tenant", tenant)
