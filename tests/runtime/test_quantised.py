"""A quantised base: adapters add to what its layers return, and never touch their packed weights."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, adapt
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lorakit
from lorakit import MultiLoraModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@torch.no_grad()
def test_adapters_on_a_bitsandbytes_base_equal_pefts(tmp_path, bits, options):
    pytest.importorskip("bitsandbytes")
    llama = ARCHITECTURES["llama"]
    llama.build().save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def load():
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, dtype=torch.float16, device_map={"": 0}
        )
        return model.eval()

    base = load()
    # PEFT copies its base with the model; a quantised one is loaded twice instead of being copied.
    tenant = adapt(load(), 0, copied=False, target_modules=["q_proj", "down_proj"], **options)
    model = MultiLoraModel(base)
    model.load_adapter("tenant", tenant)
    inputs = {key: tensor.cuda() for key, tensor in llama.inputs(3).items()}
    mixed = model(**inputs, adapter_ids=["tenant", None, "tenant"]).logits
    expected = tenant(**inputs).logits
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(mixed[1], base(**inputs).logits[1], rtol=2e-2, atol=2e-2)
    assert not torch.allclose(expected[0], base(**inputs).logits[0], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_bank_of_the_plain_base_is_served_on_the_quantised_one(tmp_path):
    """Plain LoRA reads no base weights, so where it was trained in full precision does not matter."""
    pytest.importorskip("bitsandbytes")
    llama = ARCHITECTURES["llama"]
    plain = llama.build()
    plain.save_pretrained(tmp_path / "base")
    bank = lorakit.export({"tenant": adapt(plain, 0, target_modules="all-linear")}, tmp_path / "bank", base_model=plain)
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        dtype=torch.float16,
        device_map={"": 0},
    )
    model = MultiLoraModel(base.eval(), bank)
    inputs = {key: tensor.cuda() for key, tensor in llama.inputs(2).items()}
    mixed = model(**inputs, adapter_ids=["tenant", None]).logits
    assert mixed.isfinite().all() and not torch.allclose(mixed[0], copy.deepcopy(base)(**inputs).logits[0], atol=0.1)
