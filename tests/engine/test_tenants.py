"""Tenants: policies are checked, and sequences counted under their caps, from any thread."""

import math
import threading

import numpy as np
import pytest

from lorakit.engine.tenants import TenantPolicy, Tenants
from lorakit.errors import ConfigError


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, "1", None, True, 10**400])
def test_a_weight_that_cannot_be_is_refused(weight):
    with pytest.raises(ConfigError, match="a tenant's weight is .*; give a number, above 0"):
        TenantPolicy(weight=weight)


@pytest.mark.parametrize("name", ["max_running", "max_waiting"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1", math.nan])
def test_a_cap_that_cannot_be_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"a tenant's {name} \(None: no limit\) is .*; give a whole number"):
        TenantPolicy(**{name: value})


def test_numbers_of_numpy_become_plain():
    policy = TenantPolicy(weight=np.float32(2), max_running=np.int64(3))
    assert type(policy.weight) is float and type(policy.max_running) is int
    assert policy == TenantPolicy(2.0, 3, None)


def test_caps_are_those_of_the_tenants_policy_or_the_default():
    tenants = Tenants({"capped": TenantPolicy(max_running=2, max_waiting=3)}, TenantPolicy(weight=2, max_waiting=1))
    assert tenants.policy("capped").max_running == 2 and tenants.policy("other").weight == 2
    assert tenants.may_wait("capped", 3) and not tenants.may_wait("capped", 4)
    assert tenants.may_wait("other", 1) and not tenants.may_wait("other", 2)
    tenants.count("capped", waiting=2)
    assert tenants.may_wait("capped", 1) and not tenants.may_wait("capped", 2)
    for may in (True, True, False):
        assert tenants.may_run("capped") is may
        if may:
            tenants.count("capped", waiting=-1, running=1)
    assert tenants.may_run("other")
    tenants.count("capped", running=-1)
    assert tenants.may_run("capped")


def test_all_that_waits_is_counted():
    tenants = Tenants({}, TenantPolicy())
    tenants.count("a", waiting=3)
    tenants.count("b", waiting=2)
    assert tenants.waiting == 5
    tenants.count("a", waiting=-1, running=1)
    assert tenants.waiting == 4
    tenants.count("b", waiting=-2)
    assert tenants.waiting == 2


def test_nothing_is_kept_of_tenants_that_are_gone():
    tenants = Tenants({}, TenantPolicy())
    for i in range(100):
        tenants.count(f"t{i}", waiting=1)
        tenants.count(f"t{i}", waiting=-1, running=1)
        tenants.count(f"t{i}", running=-1)
    assert not tenants._running and not tenants._waiting


def test_counting_from_many_threads_loses_nothing():
    tenants = Tenants({}, TenantPolicy(max_waiting=1000))

    def come_and_go():
        for _ in range(500):
            tenants.count("a", waiting=1)
            tenants.count("a", waiting=-1, running=1)
        for _ in range(499):
            tenants.count("a", running=-1)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tenants.waiting == 0 and tenants._running == {"a": 4}


def test_the_policies_given_may_change_afterwards():
    policies = {"a": TenantPolicy(max_running=1)}
    tenants = Tenants(policies, TenantPolicy())
    policies.clear()
    assert tenants.policy("a").max_running == 1
