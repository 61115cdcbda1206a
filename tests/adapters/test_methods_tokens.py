"""Tokens of an adapter's own, beside a method and alone."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB
from peft import AdaLoraConfig, LoraConfig, TrainableTokensConfig, get_peft_model
from peft_folders import base_of, edit_config, edit_tensors, key_of, relative, save
from safetensors.torch import load_file
from tenants import check_exact, form_of, tenant_with
from transformers import PhiConfig, PhiForCausalLM

from lorakit import AdapterBank, MultiLoraModel, export
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.methods import tokens
from lorakit.errors import (
    CheckpointError,
    ModuleNotFoundInBaseError,
    ShapeMismatchError,
    UnsupportedMethodError,
)

# Ids of ARCHITECTURES[...].inputs(2), whose rows are looked up: most of the vocabulary, but not all.
TOKENS = [ARCHITECTURES["llama"].inputs(2)["input_ids"][row, at].item() for row, at in ((0, 1), (0, 4), (1, 2))]


def lora(target, indices=TOKENS, **options):
    return LoraConfig(target_modules=target, trainable_token_indices=indices, r=4, **options)


TENANTS = {
    "an embedding": ("llama", lora(["q_proj"])),
    "an embedding and its output layer": ("llama-tied", lora(["q_proj"])),
    "an embedding that is scaled": ("gemma3", lora(["q_proj"])),
    "beside Conv1D": ("gpt2", lora(["c_attn"])),
    "of another width": ("opt", lora(["q_proj"])),
    "of an encoder-decoder": ("t5", lora(["q"])),
    "of a classifier": ("bert", lora(["query"])),
    "of a module by its name": ("gpt2", lora(["c_attn"], {"wte": TOKENS})),
    "of an output layer": ("llama", lora(["q_proj"], {"lm_head": [1, 9], "embed_tokens": TOKENS})),
    "of a tied output layer alone": ("llama-tied", lora(["q_proj"], {"lm_head": [1, 9]})),
    "different ones of tied modules": ("llama-tied", lora(["q_proj"], {"lm_head": [1, 9], "embed_tokens": TOKENS})),
    "the same of tied modules": ("llama-tied", lora(["q_proj"], {"lm_head": TOKENS, "embed_tokens": TOKENS})),
    "beside LoRA on the tied output layer": ("llama-tied", lora(["q_proj", "lm_head"], lora_alpha=6)),
    "as a whole weight": ("llama-tied", lora(["q_proj"], list(range(30)))),
    "beside dora": ("llama-tied", lora(["q_proj"], use_dora=True)),
    "beside saved modules": ("llama", lora(["q_proj"], modules_to_save=["lm_head", "norm"])),
    "beside biases": ("llama-tied", lora(["q_proj"], bias="all")),
    "beside pissa": ("llama", lora(["q_proj"], init_lora_weights="pissa")),
    "beside adalora": (
        "llama",
        AdaLoraConfig(target_modules=["q_proj"], trainable_token_indices=TOKENS, total_step=10, init_r=4),
    ),
    "alone": ("llama", TrainableTokensConfig(token_indices=TOKENS)),
    "alone, tied": ("llama-tied", TrainableTokensConfig(token_indices=TOKENS)),
    "alone, scaled": ("gemma3", TrainableTokensConfig(token_indices=TOKENS)),
    "alone, of GPT-2": ("gpt2", TrainableTokensConfig(token_indices=TOKENS)),
    "alone, of an encoder-decoder": ("t5", TrainableTokensConfig(token_indices=TOKENS)),
    "alone, of two modules": (
        "llama",
        TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens", "lm_head"]),
    ),
}


@pytest.mark.parametrize("name", TENANTS)
def test_replaced_rows_are_exact(name, tmp_path):
    architecture, config = TENANTS[name]
    form = check_exact(tenant_with(config, architecture), tmp_path / "a", architecture)
    assert form.uses_base_weights


@torch.no_grad()
def test_an_output_layers_bias_is_left_out_as_peft_does(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = PhiForCausalLM(PhiConfig(vocab_size=VOCAB, pad_token_id=0, **sizes)).eval()
    base.lm_head.bias.normal_(generator=torch.Generator().manual_seed(0))
    tenant = get_peft_model(copy.deepcopy(base), lora(["q_proj"], {"lm_head": [1, 9]})).eval()
    next(p for key, p in tenant.named_parameters() if "tokens_delta" in key).mul_(-2)
    model = MultiLoraModel(base)
    model.load_adapter("a", save(tenant, tmp_path / "a"))
    ids = torch.tensor([TOKENS, TOKENS])
    mixed, expected = model(ids, adapter_ids=["a", None]).logits, tenant(ids).logits
    assert relative(mixed[0], expected[0]) <= 1e-6
    assert relative(mixed[1], base(ids).logits[1]) <= 1e-6


def test_too_many_tokens_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "MOST_ELEMENTS", 398)
    with pytest.raises(UnsupportedMethodError, match=r"3 tokens of model\.embed_tokens take 399 numbers"):
        form_of(tenant_with(lora(["q_proj"])))


def test_many_tokens_are_a_whole_weight_and_few_are_factors():
    few, many = (form_of(tenant_with(TENANTS[name][1], "llama-tied"), "llama-tied") for name in (
        "an embedding and its output layer", "as a whole weight"))  # fmt: skip
    for path in ("model.embed_tokens", "lm_head"):
        assert few.modules[path].rank == len(TOKENS) and few.modules[path].w is None
        assert many.modules[path].rank == 0 and many.modules[path].w is not None


@torch.no_grad()
def test_one_batch_holds_tokens_of_several_tenants(tmp_path):
    base = base_of("llama-tied")
    configs = {
        "tokens": lora(["q_proj"]),
        "other": lora(["v_proj"], [TOKENS[1], 0], use_dora=True),
        "alone": TrainableTokensConfig(token_indices=TOKENS[::-1]),
        "plain": LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    }
    tenants = {name: tenant_with(config, "llama-tied", seed) for seed, (name, config) in enumerate(configs.items())}
    folders = {name: save(tenant, tmp_path / name) for name, tenant in tenants.items()}
    bank = export(folders, tmp_path / "bank", base_model=base)
    model = MultiLoraModel(copy.deepcopy(base), AdapterBank.open(bank.path))
    ids = ["tokens", None, "other", "plain", "alone", "tokens", None]
    inputs = {"input_ids": torch.tensor([*TOKENS, 5, 6]).repeat(len(ids), 1)}
    mixed = model(**inputs, adapter_ids=ids).logits
    for row, name in enumerate(ids):
        expected = (tenants[name] if name else base)(inputs["input_ids"][row : row + 1]).logits[0]
        assert relative(mixed[row], expected) <= 1e-5
    for name, folder in folders.items():
        given, stored = (
            load_file(at / "adapter_model.safetensors")
            for at in (bank.export_peft(name, tmp_path / "out" / name), folder)
        )
        assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)


@torch.no_grad()
def test_a_narrow_adapter_is_given_back_as_it_was(tmp_path):
    folder = save(tenant_with(lora(["q_proj", "lm_head"]), "llama-tied"), tmp_path / "a")
    edit_tensors(folder, lambda tensors: tensors.update({key: t.bfloat16() for key, t in tensors.items()}))
    bank = export({"a": folder}, tmp_path / "bank", base_model=base_of("llama-tied"))
    stored = load_file(folder / "adapter_model.safetensors")
    given = load_file(bank.export_peft("a", tmp_path / "out") / "adapter_model.safetensors")
    assert given.keys() == stored.keys()
    assert all(given[key].dtype == torch.bfloat16 and torch.equal(given[key], stored[key]) for key in stored)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_a_16_bit_base_is_no_further_from_the_exact_than_pefts(name, tmp_path):
    base, config = base_of(name, torch.bfloat16), TrainableTokensConfig(token_indices=TOKENS)
    tenant = get_peft_model(copy.deepcopy(base), config).eval()
    rows = [parameter for key, parameter in tenant.named_parameters() if "trainable_tokens_delta" in key]
    for row in rows:
        row.add_(0.2 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))
    model = MultiLoraModel(copy.deepcopy(base))
    model.load_adapter("a", save(tenant, tmp_path / "a"))
    inputs = ARCHITECTURES[name].inputs(4)
    exact = copy.deepcopy(tenant).double()(**inputs).logits
    ours, theirs = (relative(m.logits, exact) for m in (model(**inputs, adapter_ids="a"), tenant(**inputs)))
    assert ours <= 1.2 * theirs


def _wide(tensors):
    tensors[_ROWS] = torch.zeros(3, 33)


_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
REFUSED = {
    "no list": (CheckpointError, "list of tokens' indices", {"trainable_token_indices": "1"}, None),
    "no indices": (CheckpointError, "list of tokens' indices", {"trainable_token_indices": [1.0, 2, 3]}, None),
    "flags": (CheckpointError, "list of tokens' indices", {"trainable_token_indices": [True, 2, 3]}, None),
    "negative": (CheckpointError, "list of tokens' indices", {"trainable_token_indices": [-1, 2, 3]}, None),
    "no names": (CheckpointError, "list of tokens' indices", {"trainable_token_indices": {"": [1, 2, 3]}}, None),
    "twice": (CheckpointError, "named twice", {"trainable_token_indices": [1, 2, 1]}, None),
    "out of range": (UnsupportedMethodError, "rows of some", {"trainable_token_indices": [1, 2, 102]}, None),
    "after a gap": (UnsupportedMethodError, "rows of some", {"trainable_token_indices": [1, 101, 103]}, None),
    "too few": (ShapeMismatchError, "rows for tokens", {"trainable_token_indices": [1, 2]}, None),
    "too wide": (ShapeMismatchError, "rows for tokens", {}, _wide),
    "of another module": (CheckpointError, "does not name", {"trainable_token_indices": {"lm_head": [1]}}, None),
    "missing": (CheckpointError, "no rows", {}, lambda tensors: tensors.pop(_ROWS)),
    "not asked for": (CheckpointError, "not part of a LoRA", {"trainable_token_indices": None}, None),
    "of a norm": (
        UnsupportedMethodError,
        "no embedding",
        {"trainable_token_indices": {"norm": [1]}},
        lambda t: t.update({"base_model.model.model.norm.token_adapter.trainable_tokens_delta": t.pop(_ROWS)[:1]}),
    ),
    "of no module": (
        ModuleNotFoundInBaseError,
        "has no",
        {"trainable_token_indices": {"nothing": [1]}},
        lambda t: t.update({"base_model.model.nothing.token_adapter.trainable_tokens_delta": t.pop(_ROWS)[:1]}),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name, tmp_path):
    error, match, config, change = REFUSED[name]
    folder = save(tenant_with(lora(["q_proj"])), tmp_path / "a")
    edit_config(folder, **config)
    if change:
        edit_tensors(folder, change)
    with pytest.raises(error, match=match):
        form_of(folder)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_alpha": 0}])
def test_factors_that_rows_cannot_be_added_to_are_refused(options, tmp_path):
    tenant = tenant_with(lora(["q_proj", "lm_head"], **options), "llama-tied")
    with pytest.raises(UnsupportedMethodError, match="lm_head has tokens of its own"):
        form_of(tenant, "llama-tied")


ALONE = {
    "no tokens": (CheckpointError, "token_indices", {"token_indices": []}, None),
    "one more": (ShapeMismatchError, "rows for tokens", {"token_indices": [*TOKENS, 1]}, None),
    "an unknown option": (UnsupportedMethodError, "does not know", {"trainable_token_indices": [1]}, None),
    "rows that are not the embedding's": (
        CheckpointError,
        "differs from them",
        {},
        lambda t: t[key_of(t, "lm_head")].add_(1),
    ),
    "a stranger": (CheckpointError, "not part of", {}, lambda t: t.update({"base_model.model.x": torch.zeros(1)})),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_meant_is_refused_alone(name, tmp_path):
    error, match, config, change = ALONE[name]
    folder = save(tenant_with(TrainableTokensConfig(token_indices=TOKENS), "llama-tied"), tmp_path / "a")
    edit_config(folder, **config)
    if change:
        edit_tensors(folder, change)
    with pytest.raises(error, match=match):
        form_of(folder, "llama-tied")


def test_tied_modules_are_found_without_weights(tmp_path):
    base_of("llama-tied").save_pretrained(tmp_path / "base")
    folder = save(tenant_with(lora(["q_proj"]), "llama-tied"), tmp_path / "a")
    form = convert("a", folder, BaseModel.of(tmp_path / "base"))
    expected = form_of(folder, "llama-tied")
    for path in ("lm_head", "model.embed_tokens"):
        assert torch.equal(form.modules[path].a, expected.modules[path].a)
        assert torch.equal(form.modules[path].b, expected.modules[path].b)


@pytest.mark.parametrize(
    "config", [lora(["q_proj"]), TrainableTokensConfig(token_indices=TOKENS)], ids=["lora", "alone"]
)
def test_copies_of_tied_embeddings_beside_them_change_nothing(config, tmp_path):
    tenant = tenant_with(config, "llama-tied")
    form = form_of(save(tenant, tmp_path / "a", save_embedding_layers=True), "llama-tied")
    expected = form_of(save(tenant, tmp_path / "b"), "llama-tied")
    assert form.modules.keys() == expected.modules.keys()
    for path, module in form.modules.items():
        assert torch.equal(module.a, expected.modules[path].a) and torch.equal(module.b, expected.modules[path].b)
