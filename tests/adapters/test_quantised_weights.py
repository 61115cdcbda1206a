"""What a quantiser made of a module or a base, without any quantiser: its name, and W by the module's own product."""

import json

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from peft_folders import base_of, small
from transformers import LlamaForCausalLM

import lorakit
from lorakit.adapters.base import BaseModel
from lorakit.adapters.quantised import dequantised, is_packed, quantisation
from lorakit.errors import BaseModelNotFoundError


class Weightless(torch.nn.Module):
    """A linear as GPTQ and AWQ leave it: buffers alone, and a forward that unpacks them."""

    def __init__(self, linear, dtype=torch.float16):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.round(linear.weight.detach().T * 16).to(torch.int32))
        self.register_buffer("scales", torch.full((linear.out_features,), 1 / 16, dtype=dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x):
        y = x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "height"), [(48, 32), (32, 48), (2500, 8)])
def test_a_module_without_a_weight_is_asked_for_its_product(width, height, bias):
    linear = torch.nn.Linear(width, height, bias=bias)
    if bias:
        torch.nn.init.constant_(linear.bias, 1000.0)  # beside it float16 has nothing left of W
    module = Weightless(linear)
    calls = []
    module.register_forward_hook(lambda *arguments: calls.append(arguments))
    module.forward = calls.append  # as it is where siblings are served together
    weight = dequantised(module)
    assert is_packed(module) and weight.shape == (height, width) and weight.is_contiguous()
    assert torch.equal(weight, (module.qweight.half() / 16).T)
    assert not calls and (module.bias is not None) == bias and not weight.requires_grad


class Repacked(Weightless):
    """One that packs its tensors anew at its first product, and keeps its bias in another order, as Marlin's do."""

    packed = False

    def forward(self, x):
        if not self.packed:
            self.packed = True
            self.qweight.copy_(self.qweight.flip(1).clone())
            if self.bias is not None:
                self.bias.copy_(self.bias.flip(0).clone())
        return super().forward(x).flip(-1)


@pytest.mark.parametrize("used", [False, True], ids=["never used", "used"])
def test_a_module_that_packs_itself_anew_stays_what_it_was(used):
    base = ARCHITECTURES["llama"].build()
    attention = base.model.layers[0].self_attn
    plain = Weightless(attention.q_proj)
    attention.q_proj = Repacked(attention.q_proj)
    x = torch.randn(3, 32).half()
    if used:
        attention.q_proj(x)
    found, path = BaseModel.of(base), "model.layers.0.self_attn.q_proj"
    assert torch.equal(found.weight(path), dequantised(plain))
    assert torch.equal(found.bias(path), plain.bias) and found.parameter(f"{path}.bias") is None
    assert torch.equal(attention.q_proj(x), plain(x))


def test_a_base_of_such_modules_is_read():
    base = ARCHITECTURES["llama"].build()
    expected = BaseModel.of(base)
    layer = base.model.layers[1].mlp
    plain = layer.down_proj
    layer.down_proj = Weightless(plain)
    found, path = BaseModel.of(base), "model.layers.1.mlp.down_proj"
    assert found.places == expected.places and found.quantisation == "Weightless"
    assert torch.equal(found.weight(path), (torch.round(plain.weight * 16) / 16).half())
    assert found.parameter(f"{path}.weight") is None
    assert torch.equal(found.weight("model.layers.0.mlp.down_proj"), expected.weight("model.layers.0.mlp.down_proj"))
    layer.down_proj.scales = layer.down_proj.scales.to("meta")
    with pytest.raises(BaseModelNotFoundError, match=r"down_proj.weight is not in memory"):
        found.weight(path)


def test_a_quantiser_that_fails_is_a_typed_error():
    base = ARCHITECTURES["llama"].build()
    base.lm_head = Weightless(base.lm_head)
    base.lm_head.qweight = base.lm_head.qweight[:3]
    with pytest.raises(BaseModelNotFoundError, match=r"lm_head.weight cannot be dequantised .*RuntimeError.* device"):
        BaseModel.of(base).weight("lm_head")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (None, ""),
        ({"quant_method": "gptq", "group_size": 128, "bits": 4, "sym": True}, "gptq 4-bit group 128"),
        ({"sym": True, "bits": 4, "quant_method": "gptq", "group_size": 128}, "gptq 4-bit group 128"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes 8-bit"),
        (
            {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "load_in_4bit": True, "load_in_8bit": False},
            "bitsandbytes 4-bit nf4",
        ),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
            "torchao Int8WeightOnlyConfig",
        ),
        ({"quant_method": "of_tomorrow"}, "of_tomorrow"),
        ({}, "quantised"),
        (3, "quantised"),
    ],
)
def test_names(options, name):
    model = torch.nn.Module()
    model.config = type("Config", (), {"quantization_config": options})
    assert quantisation(model) == name


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["bits", "_type", "_data"]), inner),
)


@given(_JSON)
def test_any_configuration_has_a_name(options):
    model = torch.nn.Module()
    model.config = type("Config", (), {"quantization_config": options})
    name = quantisation(model)
    assert isinstance(name, str) and len(name) <= 200 and bool(name) == (options is not None)


def test_a_folder_whose_quantiser_is_missing_names_the_remedy(tmp_path, monkeypatch):
    """Its linears' packed numbers are never taken for W, also where shape and name are right."""
    base_of().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    options = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": options}))

    def missing(*arguments, **options):
        raise ImportError("Using `bitsandbytes` requires bitsandbytes")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", missing)
    base = BaseModel.of(tmp_path / "base")
    assert base.parameter("lm_head.weight") is None and base.parameter("model.norm.weight") is not None
    tenant = small(use_dora=True)
    with pytest.raises(BaseModelNotFoundError, match=r"requires bitsandbytes.* live model as base_model"):
        lorakit.export({"tenant": tenant}, tmp_path / "bank", base_model=tmp_path / "base")
    assert not (tmp_path / "bank").exists()
    lorakit.export({"tenant": small()}, tmp_path / "bank", base_model=tmp_path / "base")
