"""Siblings whose own products are one launch: in an engine alone, and close to what the base computes."""

import copy
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, adapt

from lorakit import MultiLoraModel
from lorakit.runtime import ops
from lorakit_kernels import dense, linear, tuning
from lorakit_kernels.tuning import Dense

SMALL = Dense(tokens=4, block_n=32, block_k=32, warps=4, stages=2)
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]


@pytest.fixture
def model(monkeypatch):
    """In bfloat16, on a device that has kernels and tiles for the base's products."""
    monkeypatch.setattr(ops, "has_kernels", lambda *_: True)
    monkeypatch.setattr(linear, "tiles", lambda device: replace(tuning.tiles(device), dense=SMALL))
    monkeypatch.setattr(ops, "can_join", lambda x, weights: len(weights) >= 2 and dense.fits(x, SMALL))
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    model = MultiLoraModel(copy.deepcopy(base).to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16))
    model.load_adapter("a", adapt(base, 1, target_modules=TARGETS))
    return model


@pytest.fixture
def joined(monkeypatch):
    """How many siblings each launch had."""
    counts = []

    def count(x, weights, biases=()):
        counts.append(len(weights))
        return linear.linears(x, weights, biases)

    monkeypatch.setattr(ops, "linears", count)
    return counts


@torch.no_grad()
def logits(model, name, tokens=3):
    ids = torch.arange(3, 3 + tokens, device=model.device).unsqueeze(0)
    slot = None if name is None else model._slot(name, keep=[name])
    with model.serving([slot] * tokens, None):
        return model.model(input_ids=ids).logits


def test_in_an_engine_siblings_are_one_launch_with_adapters_and_without(model, joined):
    own = {name: logits(model, name) for name in ("a", None)}  # shows who are siblings
    assert not joined
    layers = model.config.num_hidden_layers
    with model.lent():
        for name in ("a", None):
            found = logits(model, name)
            assert joined == [3, 2] * layers
            joined.clear()
            # Other roundings of the same sums.
            assert not torch.equal(own["a"], own[None])
            error, difference = ((found - own[name]).float().norm(), (own["a"] - own[None]).float().norm())
            assert error < 0.05 * own[name].float().norm() and error < difference / 2
        logits(model, None, tokens=SMALL.tokens + 1)
        assert not joined
    assert torch.equal(logits(model, None), own[None]) and torch.equal(logits(model, "a"), own["a"])
    assert not joined


def test_siblings_that_an_engine_shows_first_join_too(model, joined):
    with model.lent():
        logits(model, "a")
        assert not joined
        logits(model, None)
        assert joined


def test_another_model_on_the_same_base_is_no_hindrance(model, joined):
    logits(model, "a")
    second = MultiLoraModel(model.model)
    second.load_adapter("a", adapt(ARCHITECTURES["llama"].build(), 1, target_modules=TARGETS))
    own = logits(second, "a")
    with second.lent():
        found = logits(second, "a")
    assert joined == [3, 2] * model.config.num_hidden_layers
    assert (found - own).float().norm() < 0.05 * own.float().norm()


def test_a_module_that_computes_more_than_its_weights_say_is_left_alone(model, joined):
    # As accelerate wraps a module whose weights lie elsewhere.
    for layer in model.model.model.layers:
        own = layer.mlp.up_proj.forward
        layer.mlp.up_proj.forward = lambda x, own=own: own(x) * 2
    logits(model, "a")
    with model.lent():
        logits(model, "a")
    assert joined == [3] * model.config.num_hidden_layers


@torch.no_grad()
def test_siblings_that_part_stay_apart(model, joined):
    logits(model, "a")
    mlp = model.model.model.layers[0].mlp
    with model.lent():
        for _ in range(2):
            x, other = (torch.randn(1, 4, mlp.gate_proj.in_features).to(model.device, torch.bfloat16) for _ in range(2))
            assert torch.allclose(mlp.gate_proj(x).float(), (x @ mlp.gate_proj.weight.mT).float(), atol=2e-2)
            assert torch.allclose(mlp.up_proj(other).float(), (other @ mlp.up_proj.weight.mT).float(), atol=2e-2)
        assert joined == [2]
