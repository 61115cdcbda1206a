"""Deficit round robin: shares by weight whatever the sizes, first come first served within a tenant, nobody starves."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.engine.fairness import FairQueue


def chosen(queue: FairQueue, count: int | None = None, room=None) -> list:
    keys = []
    while (count is None or len(keys) < count) and (key := queue.choose(room)) is not None:
        keys.append(key)
    return keys


def test_tenants_take_turns():
    queue = FairQueue(quantum=100)
    for i in range(4):
        queue.add(f"a{i}", "a", 100)
    for i in range(2):
        queue.add(f"b{i}", "b", 100)
    assert chosen(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert len(queue) == 0 and queue.choose() is None


def test_a_newcomer_waits_for_one_turn_of_the_others():
    queue = FairQueue(quantum=100)
    for i in range(50):
        queue.add(f"popular{i}", "popular", 100)
    chosen(queue, 10)
    queue.add("new", "newcomer", 100)
    assert "new" in chosen(queue, 2)


def test_within_a_tenant_the_oldest_comes_first():
    queue = FairQueue(quantum=10)
    for i, cost in enumerate((500, 1, 1, 300)):
        queue.add(i, "a", cost)
    assert chosen(queue) == [0, 1, 2, 3]


def test_long_requests_take_no_more_tokens_than_short_ones():
    queue = FairQueue(quantum=256)
    for i in range(100):
        queue.add(("long", i), "long", 1000)
    for i in range(4000):
        queue.add(("short", i), "short", 25)
    taken = Counter()
    while min(len(queue), 1) and taken["long"] < 50_000:
        tenant, _ = queue.choose()
        taken[tenant] += 1000 if tenant == "long" else 25
    assert taken["short"] == pytest.approx(taken["long"], abs=2 * 1000)


def test_weights_set_the_shares():
    queue = FairQueue(quantum=100)
    for i in range(400):
        queue.add(("gold", i), "gold", 60, weight=3)
        queue.add(("plain", i), "plain", 60)
    taken = Counter(tenant for tenant, _ in chosen(queue, 400))
    assert taken["gold"] == pytest.approx(300, abs=6)


def test_a_small_weight_is_still_served_at_once_where_nobody_else_waits():
    queue = FairQueue(quantum=1)
    queue.add("a", "a", 1_000_000, weight=1e-6)
    assert queue.choose() == "a"


def test_a_tenant_without_room_is_passed_over_and_gathers_nothing():
    queue = FairQueue(quantum=100)
    for i in range(6):
        queue.add(f"a{i}", "a", 100)
        queue.add(f"b{i}", "b", 100)
    assert chosen(queue, room=lambda tenant, _: tenant == "b") == [f"b{i}" for i in range(6)]
    for i in range(6):
        queue.add(f"c{i}", "c", 100)
    assert chosen(queue, 4) in (["a0", "c0", "a1", "c1"], ["c0", "a0", "c1", "a1"])


def test_a_removed_request_is_not_charged():
    queue = FairQueue(quantum=100)
    queue.add("gone", "a", 10_000)
    queue.add("a", "a", 100)
    queue.add("b", "b", 100)
    assert queue.remove("gone") and not queue.remove("gone")
    assert "gone" not in queue and "a" in queue
    assert chosen(queue) == ["a", "b"]


def test_a_refund_counts_for_the_next_turn():
    queue = FairQueue(quantum=100)
    for i in range(4):
        queue.add(f"a{i}", "a", 100)
        queue.add(f"b{i}", "b", 100)
    assert queue.choose() == "a0"
    queue.refund("a", 100)
    queue.refund("nobody", 100)
    assert chosen(queue, 3) == ["a1", "b0", "a2"]


REQUESTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3000)), max_size=60)


@given(REQUESTS, st.integers(1, 2000), st.lists(st.floats(0.01, 100), min_size=5, max_size=5))
def test_every_request_is_chosen_once_and_in_its_tenants_order(requests, quantum, weights):
    queue = FairQueue(quantum)
    for i, (tenant, cost) in enumerate(requests):
        queue.add((tenant, i), tenant, cost, weights[tenant])
    keys = chosen(queue)
    assert sorted(keys) == sorted((tenant, i) for i, (tenant, _) in enumerate(requests))
    for tenant in range(5):
        own = [i for owner, i in keys if owner == tenant]
        assert own == sorted(own)


@given(st.lists(st.integers(1, 500), min_size=30, max_size=60), st.integers(1, 2000))
def test_shares_of_busy_tenants_differ_by_a_turn_and_a_request_at_most(costs, quantum):
    """The bound of the paper's Lemma 2, for equal weights."""
    queue = FairQueue(quantum)
    for tenant in "ab":
        for i, cost in enumerate(costs if tenant == "a" else costs[::-1]):
            queue.add((tenant, i, cost), tenant, cost)
    taken = Counter(a=0, b=0)
    for _ in costs:
        tenant, _, cost = queue.choose()
        taken[tenant] += cost
        if taken["a"] < sum(costs) and taken["b"] < sum(costs):
            assert abs(taken["a"] - taken["b"]) <= quantum + 2 * max(costs)
