"""The engine's settings: wrong ones are refused by name before anything is started."""

import math
import pickle
from dataclasses import fields

import numpy as np
import pytest

from lorakit.engine.config import EngineConfig
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import ConfigError

WHOLE = {
    "max_requests": 1,
    "max_batch_tokens": 1,
    "cache_memory": 1,
    "page_size": 4,
    "max_waiting": 1,
    "quantum": 1,
    "readers": 1,
    "restarts": 0,
}
MAY_BE_NONE = {"max_requests", "max_batch_tokens", "cache_memory", "page_size"}
BAD = {
    **{name: [least - 1, -1, 1.5, True, "8", math.nan, [8]] for name, least in WHOLE.items()},
    "cuda_graphs": [1, 0, "no"],
    "compile_level": [-1, 4, 1.5, True, None, "1"],
    "prefix_cache": [1, 0, None, "no"],
    "patience": [-1, math.nan, math.inf, None, "1", True],
    "stop_timeout": [0, -1, math.nan, math.inf, 1e300, None, "1", True],
    "tenants": [None, [TenantPolicy()], {"a": 2.0}, {"a": None}, {5: TenantPolicy()}],
    "default_tenant": [None, 1.0, "a"],
}


def test_every_setting_is_checked():
    assert set(BAD) == {field.name for field in fields(EngineConfig)}


def short(value):
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]], ids=short)
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^the engine's {name} .*; give "):
        EngineConfig(**{name: value})


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_the_least_is_right_and_becomes_plain(name):
    value = getattr(EngineConfig(**{name: np.int64(WHOLE[name])}), name)
    assert value == WHOLE[name] and type(value) is int
    if name in MAY_BE_NONE:
        assert getattr(EngineConfig(**{name: None}), name) is None
    else:
        with pytest.raises(ConfigError, match=name):
            EngineConfig(**{name: None})


def test_the_policies_given_may_change_afterwards():
    policies = {"a": TenantPolicy(weight=2)}
    config = EngineConfig(tenants=policies)
    policies["b"] = TenantPolicy()
    assert config.tenants == {"a": TenantPolicy(weight=2)}


def test_it_can_be_sent_to_another_process():
    config = EngineConfig(tenants={"a": TenantPolicy(weight=2)}, patience=3)
    assert pickle.loads(pickle.dumps(config)) == config
