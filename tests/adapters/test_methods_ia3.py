"""IA³ checkpoints → canonical form."""

import pytest
import transformers
from peft import IA3Config, get_peft_model
from peft_folders import save
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.errors import CheckpointError, UnsupportedMethodError


@pytest.mark.parametrize(
    ("name", "targets", "feedforward"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("llama", ["q_proj", "up_proj", "down_proj"], ["down_proj"]),
        ("llama", ["o_proj"], []),
        ("gpt2", ["c_attn"], []),
        ("bert", ["query", "value"], []),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, feedforward):
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward)
    form = check_exact(tenant_with(config, name), tmp_path / "tenant", name)
    assert form.method == "ia3" and form.rank == 0 and not form.uses_base_weights


def test_a_feedforward_input_without_a_gate_is_refused(tmp_path):
    config = IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    folder = save(tenant_with(config, "gpt2"), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match=r"mlp\.c_proj.*gated MLP"):
        form_of(folder, "gpt2")


def test_a_gated_mlp_that_does_more_between_its_products_is_refused(tmp_path):
    """BitNet normalises there: a scale of the input is not one of the output before."""
    config = transformers.BitNetConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = transformers.BitNetForCausalLM(config)
    tenant = get_peft_model(base, IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))
    with pytest.raises(UnsupportedMethodError, match="plain gated MLP"):
        convert("tenant", save(tenant, tmp_path / "tenant"), BaseModel.of(base))


@pytest.mark.parametrize("value", [None, "(", "a{99999999999}", 3, [1]], ids=str)
def test_feedforward_modules_that_cannot_be_are_refused(tmp_path, value):
    check_refused(
        save(tenant_with(IA3Config(target_modules=["k_proj"], feedforward_modules=[])), tmp_path / "tenant"),
        CheckpointError,
        "feedforward_modules",
        {"feedforward_modules": value},
    )


def test_an_unknown_option_is_refused(tmp_path):
    check_refused(
        save(tenant_with(IA3Config(target_modules=["k_proj"], feedforward_modules=[])), tmp_path / "tenant"),
        UnsupportedMethodError,
        "rotates",
        {"rotates": True},
    )
