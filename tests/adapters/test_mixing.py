"""One batch of many methods: every row as PEFT alone computes it."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig
from peft_folders import base_of, relative, save
from tenants import tenant_with

import lorakit
from lorakit import MultiLoraModel

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "dora": LoraConfig(r=4, use_dora=True, target_modules=LINEAR),
    "vera": VeraConfig(r=16, target_modules=["q_proj", "o_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "lora": LoraConfig(r=64, lora_alpha=8, target_modules="all-linear"),
    "adalora": AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=LINEAR),
    "loha": LoHaConfig(r=3, alpha=2, target_modules=["gate_proj", "up_proj"]),
}
ROWS = ["dora", "vera", None, "ia3", "lora", "adalora", "loha", "vera", None, "dora"]


@pytest.fixture(scope="module")
def tenants():
    return {name: tenant_with(config, seed=seed) for seed, (name, config) in enumerate(CONFIGS.items())}


@pytest.fixture(scope="module")
def bank(tenants, tmp_path_factory):
    root = tmp_path_factory.mktemp("mixing")
    folders = {name: save(tenant, root / name) for name, tenant in tenants.items()}
    return lorakit.export(folders, root / "bank", base_model=base_of())


@torch.no_grad()
def test_every_row_equals_peft_alone(bank, tenants):
    model = MultiLoraModel(copy.deepcopy(base_of()), bank)
    inputs = ARCHITECTURES["llama"].inputs(len(ROWS))
    mixed = model(**inputs, adapter_ids=ROWS).logits
    for row, name in enumerate(ROWS):
        alone = copy.deepcopy(tenants[name] if name else base_of()).double()
        reference = alone(input_ids=inputs["input_ids"][row : row + 1]).logits
        assert relative(mixed[row : row + 1], reference) <= 2e-5, name


@torch.no_grad()
def test_greedy_tokens_equal_peft_alone(bank, tenants):
    model = MultiLoraModel(copy.deepcopy(base_of()), bank)
    prompts = ARCHITECTURES["llama"].inputs(len(ROWS))["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False}
    mixed = model.generate(prompts, adapter_ids=ROWS, **options)
    for row, name in enumerate(ROWS):
        alone = tenants[name] if name else base_of()
        assert torch.equal(mixed[row], alone.generate(input_ids=prompts[row : row + 1], **options)[0]), name
