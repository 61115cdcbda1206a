"""Places: the modules that can carry an adapter, by what they are and not by their names."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from peft_folders import base_of, small
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.places import Place, base_modules, place_of, places


class Packed(nn.Module):
    """A quantised linear as libraries make them: sizes, and packed buffers."""

    def __init__(self, in_features=6, out_features=4):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(3, 4, dtype=torch.int32))


class OddNorm(nn.LayerNorm):
    """Its output is no multiple of its weight."""

    def forward(self, x):
        return super().forward(x).tanh()


class Container(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.inner = nn.Linear(6, 4)


@pytest.mark.parametrize(
    ("module", "place"),
    [
        (nn.Linear(6, 4), Place("linear", 6, 4, transposed=False)),
        (nn.Linear(6, 4, bias=False, dtype=torch.bfloat16, device="meta"), Place("linear", 6, 4, transposed=False)),
        (Conv1D(4, 6), Place("linear", 6, 4, transposed=True)),
        (nn.Embedding(6, 4), Place("embedding", 6, 4, transposed=True)),
        (Packed(), Place("linear", 6, 4, transposed=False)),
        (nn.LayerNorm(4), Place("norm", 4, 4, transposed=False)),
        (nn.RMSNorm(4, device="meta"), Place("norm", 4, 4, transposed=False)),
        (Gemma3RMSNorm(4), Place("norm", 4, 4, transposed=False, offset=1.0)),
        (nn.LayerNorm((3, 4)), None),
        (nn.LayerNorm(4, elementwise_affine=False), None),
        (nn.GroupNorm(2, 4), None),
        (nn.BatchNorm1d(4), None),
        (OddNorm(4), None),
        (nn.Conv2d(3, 4, 2), None),
        (nn.EmbeddingBag(6, 4), None),
        (nn.Identity(), None),
        (nn.Dropout(), None),
        (Container(), None),
        (nn.Bilinear(3, 3, 4), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_place_of(module, place):
    assert place_of(module) == place


class SetNorm(nn.Module):
    """What it adds to its weight is one of its settings, plain or not."""

    def __init__(self, **settings):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.__dict__.update(settings)

    def forward(self, x):
        return x * (self.weight + (self.config["add"] if hasattr(self, "config") else self.add))


def test_norms_of_one_class_may_differ():
    norms = [SetNorm(add=1), SetNorm(add=0), SetNorm(add=1), SetNorm(config={"add": 1}), SetNorm(config={"add": 0})]
    found = places(nn.Sequential(*norms))
    assert [place.offset for place in found.values()] == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_places_have_the_shapes_of_their_weights(name):
    model = base_of(name)
    found = places(model)
    modules = dict(model.named_modules())
    assert set(found) == {
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) or "norm" in type(module).__name__.lower()
    }
    assert list(found) == [path for path in modules if path in found], "in the order of named_modules()"
    for path, place in found.items():
        linear = (place.out_features, place.in_features)
        shape = (place.out_features,) if place.kind == "norm" else linear[::-1] if place.transposed else linear
        assert tuple(modules[path].weight.shape) == shape


def test_a_wrapped_model_has_the_places_of_its_base():
    tenant = small(target_modules=["q_proj", "embed_tokens", "lm_head"])
    tenant.add_adapter("second", tenant.peft_config["default"])
    model = tenant.get_base_model()
    assert places(model) == places(base_of())
    assert [path for path, _ in base_modules(model)] == [path for path, _ in base_of().named_modules()]
    assert all(type(module).__module__.split(".")[0] != "peft" for _, module in base_modules(model))


def test_reading_places_changes_nothing():
    model = copy.deepcopy(base_of())
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    places(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
