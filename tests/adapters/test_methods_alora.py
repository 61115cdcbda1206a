"""aLoRA checkpoints → canonical form. Where the adapter acts is the runtime's: tests/runtime/test_activation.py."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from compatibility import places_of, served
from peft import LoraConfig
from peft_folders import base_of, edit_config, relative, save
from safetensors.torch import load_file
from tenants import WEIGHTS, form_of, tenant_with

import lorakit
from lorakit import MultiLoraModel
from lorakit.adapters.methods import restore
from lorakit.errors import BankError, CheckpointError, UnsupportedMethodError

INVOCATION = [9, 4]


def config_of(**options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    return LoraConfig(**{"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM", **options})


@pytest.fixture
def folder(tmp_path):
    return save(tenant_with(config_of()), tmp_path / "tenant")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "use_rslora": True}),
        ("qwen3", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
        ("llama", {"lora_bias": True}),
    ],
    ids=str,
)
@torch.no_grad()
def test_equal_to_peft_through_a_bank(tmp_path, name, options):
    tenant = tenant_with(config_of(**options), name)
    folder = save(tenant, tmp_path / "tenant")
    base = base_of(name)
    bank = lorakit.export({"tenant": folder}, tmp_path / "bank", base_model=base)
    assert bank["tenant"].method == "alora"
    model = MultiLoraModel(copy.deepcopy(base), bank)
    ids = ARCHITECTURES[name].inputs(3)["input_ids"]
    ids[0, 2:4] = ids[1, 2:4] = torch.tensor(INVOCATION)
    reference = copy.deepcopy(tenant).double()(input_ids=ids).logits
    plain = base(input_ids=ids).logits
    assert relative(plain[0], reference[0]) > 1e-3, "the adapter does nothing, so nothing is tested"
    mixed = model(input_ids=ids, adapter_ids=["tenant", None, "tenant"]).logits
    error = relative(mixed[[0, 2]], reference[[0, 2]])
    assert error <= 2e-5
    assert relative(mixed[1], plain[1]) <= 1e-6
    form = form_of(folder, name)
    stored, given = load_file(folder / WEIGHTS), restore(form)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)
    served("alora", name, places_of(base, list(form.modules)), error)


@pytest.mark.parametrize(
    "tokens", [[], [-1], [1.0], [True], ["1"], "12", 7, {"1": 2}, [1 << 31], [[1]], [None], [3] * 4097], ids=repr
)
def test_invocations_that_cannot_be(folder, tokens):
    edit_config(folder, alora_invocation_tokens=tokens)
    with pytest.raises(CheckpointError, match=r"alora_invocation_tokens .* token ids"):
        form_of(folder)


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_qalora": True}, {"kasa_config": {}}], ids=str
)
def test_with_another_variant_it_is_refused(folder, changes):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedMethodError, match="alora_invocation_tokens.* not served together"):
        form_of(folder)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_where_peft_never_lets_it_act_it_is_refused(folder, task_type):
    edit_config(folder, task_type=task_type)
    with pytest.raises(UnsupportedMethodError, match="task_type"):
        form_of(folder)


def test_an_encoder_decoder_is_refused(tmp_path):
    folder = save(tenant_with(config_of(target_modules=["q"]), "t5"), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match="encoder-decoder"):
        form_of(folder, "t5")


def test_an_embedding_is_refused(tmp_path):
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    folder = save(tenant_with(config), tmp_path / "tenant")
    edit_config(folder, alora_invocation_tokens=INVOCATION)
    with pytest.raises(UnsupportedMethodError, match="embed_tokens is not served"):
        form_of(folder)


def test_a_sum_is_refused(tmp_path, folder):
    plain = save(tenant_with(config_of(alora_invocation_tokens=None)), tmp_path / "plain")
    bank = lorakit.export({"a": folder, "b": plain}, tmp_path / "bank", base_model=base_of())
    for combination in ("cat", "linear", "svd"):
        with pytest.raises(UnsupportedMethodError, match="'a' acts from its invocation tokens on"):
            bank.merge("sum", {"a": 1.0, "b": 1.0}, combination=combination)


def test_a_damaged_banks_invocation_is_refused(tmp_path, folder):
    bank = lorakit.export({"tenant": folder}, tmp_path / "bank", base_model=base_of())
    bank["tenant"].config["alora_invocation_tokens"] = ["x"]
    model = MultiLoraModel(copy.deepcopy(base_of()), bank)
    with pytest.raises(BankError, match="alora_invocation_tokens"):
        model(torch.tensor([[3, 9, 4]]), adapter_ids=["tenant"])
