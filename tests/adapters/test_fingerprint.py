"""Fingerprints: the same base is known in any dtype, every other is refused with what differs."""

import copy
import dataclasses
import json

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_folders import base_of, small

from lorakit.adapters.base import BaseModel
from lorakit.adapters.fingerprint import check, fingerprint, short
from lorakit.errors import BankError, BaseModelMismatchError, LorakitError

LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(scope="module")
def print_():
    return fingerprint(BaseModel.of(base_of()))


def altered(**options):
    return dataclasses.replace(LLAMA, options={**LLAMA.options, **options}).build()


def test_it_is_small_plain_json_and_the_same_every_time(print_):
    text = json.dumps(print_)
    assert len(text) < 20_000 and json.loads(text) == print_
    assert fingerprint(BaseModel.of(base_of())) == print_
    assert (print_["architecture"], print_["model_type"]) == ("LlamaForCausalLM", "llama")
    assert len(short(print_)) == 12 and short(print_) != short({**print_, "model_type": "x"})


def test_a_wrapped_base_is_itself(print_):
    assert fingerprint(BaseModel.of(small())) == print_


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_has_the_fingerprint_of_its_model(name, tmp_path):
    base_of(name).save_pretrained(tmp_path)
    base = BaseModel.of(tmp_path)
    live = fingerprint(BaseModel.of(base_of(name)))
    assert fingerprint(base) == live
    check(base, live, owner="the bank")


@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_another_dtype_is_the_same_base(name, here, there):
    recorded = fingerprint(BaseModel.of(ARCHITECTURES[name].build(there)))
    check(BaseModel.of(ARCHITECTURES[name].build(here)), recorded, owner="the bank")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter", [name for name, _ in base_of().named_parameters()])
def test_one_other_parameter_is_another_base(print_, parameter, dtype):
    other = copy.deepcopy(base_of())
    with torch.no_grad():
        other.get_parameter(parameter).mul_(1.02)
    with pytest.raises(
        BaseModelMismatchError, match=rf"the bank was made for another .*the weights of {parameter} dif"
    ):
        check(BaseModel.of(other.to(dtype)), print_, owner="the bank")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: ARCHITECTURES["mistral"].build(), "made for a LlamaForCausalLM, this is a MistralForCausalLM"),
        (lambda: altered(hidden_size=64), "the modules or their shapes differ"),
        (lambda: altered(num_hidden_layers=3), "the modules or their shapes differ"),
        (lambda: altered(vocab_size=102), "the modules or their shapes differ"),
    ],
)
def test_other_bases(print_, other, message):
    with pytest.raises(BaseModelMismatchError, match=rf"the bank was made .*{message}.*export the adapters again"):
        check(BaseModel.of(other()), print_, owner="the bank")


def first_sample(print_):
    return next(iter(print_["sample"].values()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.clear(),
        lambda p: p.pop("architecture"),
        lambda p: p.pop("places"),
        lambda p: p.pop("sample"),
        lambda p: p.update(sample=[]),
        lambda p: p.update(sample={"model.norm.weight": 3}),
        lambda p: first_sample(p).update(values="!"),
        lambda p: first_sample(p).update(values=""),
        lambda p: first_sample(p).update(values="AAAA"),
        lambda p: first_sample(p).update(values=None),
        lambda p: first_sample(p).update(dtype="float99"),
        lambda p: first_sample(p).update(dtype=3),
    ],
)
def test_a_damaged_fingerprint_is_said_so(print_, damage):
    damaged = copy.deepcopy(print_)
    damage(damaged)
    with pytest.raises(BankError, match="the bank has a damaged fingerprint of its base model; export it again"):
        check(BaseModel.of(base_of()), damaged, owner="the bank")


def test_half_precision_samples_of_other_lengths_are_damage():
    damaged = fingerprint(BaseModel.of(LLAMA.build(torch.float16)))
    first_sample(damaged)["values"] = "AAAA" * 4
    with pytest.raises(LorakitError, match="the bank"):
        check(BaseModel.of(LLAMA.build(torch.bfloat16)), damaged, owner="the bank")


@settings(max_examples=100)
@given(
    path=st.sampled_from(
        "architecture places model_type sample sample/0 sample/0/dtype sample/0/values sample/0/numel".split()
    ),
    value=st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()) | st.just({"a": 1}),
)
def test_any_json_passes_or_is_a_typed_error(print_, path, value):
    changed = copy.deepcopy(print_)
    inner, steps = changed, path.split("/")
    for step in steps[:-1]:
        inner = inner[sorted(inner)[0] if step == "0" else step]
    inner[sorted(inner)[0] if steps[-1] == "0" else steps[-1]] = value
    try:
        check(BaseModel.of(base_of()), changed, owner="the bank")
    except LorakitError as error:
        assert "the bank" in str(error)


class Packed(torch.nn.Module):
    """A linear as a quantiser leaves it: a packed weight, and a rounded one when asked back."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.nn.Parameter(linear.weight.detach().clone())
        self.W_q = None  # PEFT knows HQQ's layers by it

    def dequantize(self):
        return torch.round(self.weight.detach() * 8) / 8


def test_a_quantised_base_is_recognised_by_what_is_not_packed():
    base = ARCHITECTURES["llama"].build()
    expected = fingerprint(BaseModel.of(base))
    for layer in base.model.layers:
        layer.mlp.up_proj, layer.mlp.down_proj = Packed(layer.mlp.up_proj), Packed(layer.mlp.down_proj)
    check(BaseModel.of(base), expected, owner="the bank")
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(0.1)
    with pytest.raises(BaseModelMismatchError, match="embed_tokens"):
        check(BaseModel.of(base), expected, owner="the bank")
