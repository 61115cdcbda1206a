"""Grad and inference modes, calls inside calls, casts: what one call leaves for the next, on both backends."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, adapt
from transformers import LogitsProcessor, LogitsProcessorList

from lorakit import MultiLoraModel
from lorakit.errors import AdapterIdsError
from lorakit.runtime import ops
from lorakit.runtime.routing import Routing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(params=[False, True], ids=["stacked", "kernels"])
def kernels(request, monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: request.param)
    return request.param


@pytest.fixture
def model():
    base = LLAMA.build().to(DEVICE)
    model = MultiLoraModel(copy.deepcopy(base))
    for seed, name in enumerate("ab"):
        model.load_adapter(name, adapt(base, seed, target_modules=["q_proj", "k_proj", "down_proj"]))
    return model


def inputs(rows):
    return {key: tensor.to(DEVICE) for key, tensor in LLAMA.inputs(rows, length=2).items()}


def test_generate_takes_kernels_whatever_the_callers_mode(model, kernels):
    model.generate(**inputs(2), adapter_ids=["a", None], max_new_tokens=1, do_sample=False)
    assert isinstance(model._adapted.last.batches[0], Routing) == kernels


def test_modes_may_follow_each_other(model, kernels):
    ids = ["a", None]
    with torch.inference_mode():
        first = model(**inputs(2), adapter_ids=ids).logits.clone()
    with torch.no_grad():
        model(**inputs(2), adapter_ids=["b", "a"])
        assert torch.equal(model(**inputs(2), adapter_ids=ids).logits, first)
    model(**inputs(2), adapter_ids=ids).logits.sum().backward()


@torch.no_grad()
def test_a_call_inside_a_call_changes_neither(model, kernels):
    outer, inner = ["a", "b"], ["b", None]
    expected = model.generate(**inputs(2), adapter_ids=outer, max_new_tokens=3, do_sample=False)
    alone = model(**inputs(2), adapter_ids=inner).logits
    plain = model(**inputs(2)).logits

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert torch.equal(model(**inputs(2), adapter_ids=inner).logits, alone)
            assert torch.equal(model(**inputs(2)).logits, plain)
            return scores

    options = {"max_new_tokens": 3, "do_sample": False, "logits_processor": LogitsProcessorList([Calls()])}
    assert torch.equal(model.generate(**inputs(2), adapter_ids=outer, **options), expected)


@torch.no_grad()
def test_a_cast_of_the_base_forms_the_batch_anew(model, kernels):
    if kernels:
        pytest.skip("kernels do not serve float64")
    ids = ["a", None]
    model(**inputs(2), adapter_ids=ids)
    model.double()
    cast = model(**inputs(2), adapter_ids=ids).logits
    model._adapted.last = None
    assert torch.equal(model(**inputs(2), adapter_ids=ids).logits, cast)


@torch.no_grad()
def test_siblings_notice_an_input_that_was_changed_in_place(model, kernels):
    ids = ["a", None]
    model(**inputs(2), adapter_ids=ids)  # finds siblings
    attention = model.model.model.layers[0].self_attn
    x = torch.randn(2, 2, 32, device=DEVICE)
    with model._batch(ids, (x,), {}):
        attention.q_proj(x)
        x.mul_(1.5)
        k = attention.k_proj(x)
    with model._batch(ids, (x,), {}):
        torch.testing.assert_close(attention.k_proj(x.clone()), k)


@pytest.mark.parametrize("ids", [5, [["a"], ["b"]], [b"a", "a"]], ids=repr)
def test_ids_that_are_no_names_are_refused(model, ids):
    with pytest.raises(AdapterIdsError, match="adapter_ids"):
        model(**inputs(2), adapter_ids=ids)
