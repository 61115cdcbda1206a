"""A quantised base: adapters add to what its layers return, and never touch their packed weights."""

import pytest
import torch
from architectures import ARCHITECTURES, adapt
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import lorakit
from lorakit import MultiLoraModel

pytestmark = pytest.mark.gpu


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


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
    plain = base(**inputs).logits
    # LLM.int8 chooses its outlier columns over the whole batch, so a row depends a little on the others there.
    assert relative(mixed[[0, 2]], expected[[0, 2]]) < (0.01 if bits == 4 else 0.05)
    assert relative(mixed[1], plain[1]) < (0.01 if bits == 4 else 0.05)
    assert relative(plain[[0, 2]], expected[[0, 2]]) > 0.3


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
    assert mixed.isfinite().all() and relative(base(**inputs).logits[0], mixed[0]) > 0.3
