"""An engine serves what `MultiLoraModel` serves: adapters of every method of PEFT, side by side in one batch."""

import peft
from peft_folders import base_of
from served import SMALL, alone, at_rest, config, double, requests, served
from tenants import SMALL as CONFIGS
from tenants import each_family, tenant_with

import lorakit
from lorakit import Engine, MultiLoraModel

LINEAR = ["q_proj", "down_proj"]
BESIDE = {
    "head": peft.LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "biases": peft.LoraConfig(r=2, target_modules=LINEAR, bias="lora_only"),
    "norm": peft.LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["input_layernorm"]),
}
"""Whole tensors beside an adapter."""


def tenant(method, seed):
    return tenant_with(CONFIGS[method](target_modules=LINEAR), seed=seed)


@each_family()
def test_each_method_beside_rows_of_another_and_of_none(method):
    model = MultiLoraModel(double())
    model.load_adapter("own", tenant(method, 1))
    model.load_adapter("lora", tenant("LORA", 2))
    asked = requests(6, ["own", "own", "lora", None], longest=12)
    expected = [alone(model, one) for one in asked]
    with Engine(model, SMALL) as engine:
        assert served(engine, asked) == expected
        at_rest(engine)


def test_what_comes_may_be_of_another_form_and_size_than_what_goes(tmp_path):
    """All in one batch, taking turns in little memory."""
    methods = ("LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", "LOHA", "VERA", "HRA")
    tenants = {name: tenant_with(made, seed=seed) for seed, (name, made) in enumerate(BESIDE.items())}
    tenants |= {method: tenant(method, 9 + seed) for seed, method in enumerate(methods)}
    bank = lorakit.export(tenants, tmp_path / "bank", base_model=base_of())
    asked = requests(30, [None, *tenants], longest=12)
    roomy = MultiLoraModel(double(), bank)
    expected = [alone(roomy, one) for one in asked]
    room = 2 * max(entry.nbytes for entry in bank.values()) + 1024
    assert room < sum(entry.nbytes for entry in bank.values())
    model = MultiLoraModel(double(), bank, adapter_memory=room)
    with Engine(model, config(max_requests=4, patience=0.05)) as engine:
        assert served(engine, asked) == expected
        assert engine.stats().device.nbytes <= room
        at_rest(engine)
