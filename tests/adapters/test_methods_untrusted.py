"""Whatever a file says, every family converts it or refuses it by a typed error: nothing else, and in little memory."""

import dataclasses
import random

import pytest
import torch
from peft_folders import base_of
from tenants import SMALL, each_family, tenant_with

from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.peft_reader import read_checkpoint
from lorakit.errors import LorakitError

# The largest would take more memory than there is.
_VALUES = [
    0, 1, 2, 3, 5, -1, 64, 2**31 - 1, 2**62 - 1, 10**30, 10**400, 0.5, -0.5, 1e39, float("nan"), float("inf"), True,
    False, None, "", "x", "(", "a{99999999999}", "all-linear", [], [0], ["q_proj"], [None], [[[[]]]], {}, {"x": 1},
    {"q_proj": 0}, {"q_proj": 2**31 - 1}, {"q_proj": {}}, {"(": 1}, {"model.layers.0.self_attn.q_proj.lora_E": [True]},
]  # fmt: skip
_CHANGES = [
    lambda tensor: tensor[:0],
    lambda tensor: tensor[..., :-1],
    lambda tensor: torch.cat([tensor, tensor]),
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor[None],
    lambda tensor: tensor.mT.contiguous() if tensor.dim() > 1 else tensor[:, None],
    lambda tensor: torch.ones((), dtype=tensor.dtype),
    lambda tensor: torch.ones(0, dtype=tensor.dtype),
    torch.zeros_like,
    lambda tensor: torch.full_like(tensor, 200),
    lambda tensor: torch.full_like(tensor, torch.finfo(tensor.dtype).max if tensor.is_floating_point() else 255),
    lambda tensor: torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 255),
    lambda tensor: tensor.to(torch.float16),
    lambda tensor: tensor.to(torch.float64),
    lambda tensor: tensor.to(torch.int64),
    lambda tensor: tensor.to(torch.uint8),
]
_TRIES = 300


def mutate(checkpoint, pick):
    """The checkpoint with one to three changes of its configuration and tensors."""
    config, tensors = dict(checkpoint.config), dict(checkpoint.tensors)
    for _ in range(pick.randint(1, 3)):
        how = pick.choice(["set", "set", "unset", "change", "change", "drop", "rename"])
        key = pick.choice(sorted(tensors) or [""])
        field = pick.choice(sorted(set(config) - {"peft_type"}) or ["r"])
        if how == "set":
            config[pick.choice([field, field, field, "an_option_of_tomorrow"])] = pick.choice(_VALUES)
        elif how == "unset":
            config.pop(field, None)
        elif key and how == "change" and tensors[key].dim():
            tensors[key] = pick.choice(_CHANGES)(tensors[key])
        elif key:
            tensor = tensors.pop(key)
            if how == "rename":
                old, new = pick.choice([("layers.0", "layers.1"), ("_A", "_B"), ("q_proj", "k_proj"), ("weight", "x")])
                tensors[key.replace(old, new)] = tensor
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


@pytest.mark.filterwarnings("ignore")
@each_family()
def test_any_mutation_is_converted_or_refused_by_a_typed_error(method):
    base = BaseModel.of(base_of())
    checkpoint = read_checkpoint(tenant_with(SMALL[method](target_modules=["q_proj", "down_proj"])))
    pick, refused = random.Random(method), 0
    for _ in range(_TRIES):
        changed = mutate(checkpoint, pick)
        try:
            convert("tenant", changed, base)
        except LorakitError as error:
            refused += 1
            assert 0 < len(str(error)) < 1000
    assert _TRIES / 2 < refused < _TRIES
