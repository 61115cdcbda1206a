"""Isolation and determinism: a row's bits depend on its own adapter alone, and are the same at every call."""

import pytest
import torch
from architectures import ARCHITECTURES, METHODS, adapt

from lorakit import MultiLoraModel


def poisoned(name: str, method: str) -> MultiLoraModel:
    """A model with a good adapter and one whose slot is full of NaN: a load that went wrong, past all checks."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    model = MultiLoraModel(base)
    for seed, tenant in enumerate(["good", "bad", "other"]):
        model.load_adapter(tenant, adapt(base, seed, **METHODS[method](architecture)))
    return model


def fill(model: MultiLoraModel, name: str, value: float) -> None:
    slot = model._slot(name, keep=())
    for module in slot.modules.values():
        for _, tensor in module.tensors():
            tensor.fill_(value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_an_adapter_full_of_nan_changes_no_other_row_by_a_bit(name, method):
    model = poisoned(name, method)
    ids = ["good", "bad", None, "other", "bad", "good", None]
    inputs = ARCHITECTURES[name].inputs(len(ids))
    before = model(**inputs, adapter_ids=ids).logits
    fill(model, "bad", float("nan"))
    model._adapted.last = None  # the stacks hold copies of the factors
    after = model(**inputs, adapter_ids=ids).logits
    for row, tenant in enumerate(ids):
        if tenant == "bad":
            assert after[row].isnan().all()
        else:
            assert torch.equal(before[row], after[row])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_same_call_gives_the_same_bits(name):
    model = poisoned(name, "lora")
    ids = ["good", None, "other", "good", "bad"]
    inputs = ARCHITECTURES[name].inputs(len(ids))
    first = model(**inputs, adapter_ids=ids).logits
    model(**inputs, adapter_ids=ids[::-1])
    assert torch.equal(first, model(**inputs, adapter_ids=ids).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_rows_output_depends_on_no_other_rows_adapter(name):
    """On the CPU to rounding: a batched product may block its rows otherwise when there are more of them."""
    model = poisoned(name, "lora")
    inputs = ARCHITECTURES[name].inputs(4)
    expected = model(**inputs, adapter_ids=["good", None, None, None]).logits[0]
    for others in (["bad", "other", None], ["good", "good", "good"], ["other", "good", "bad"]):
        torch.testing.assert_close(model(**inputs, adapter_ids=["good", *others]).logits[0], expected)


@torch.no_grad()
def test_base_rows_are_the_bases_bits():
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    model = poisoned("llama", "lora")
    inputs = architecture.inputs(4)
    plain = base(**inputs).logits
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs, adapter_ids=[None] * 4).logits, plain)
    assert torch.equal(model(**inputs, adapter_ids=["good", None, "bad", None]).logits[[1, 3]], plain[[1, 3]])
