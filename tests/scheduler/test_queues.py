"""The orders in which requests wait."""

import random
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from lorakit.scheduler.queues import FairFcfs, Fcfs, FcfsEach


def request(key, arrival=None, adapter=0, cost=100, placed=False):
    return SimpleNamespace(
        key=key, arrival=key if arrival is None else arrival, adapter=adapter, cost=cost, placed=placed
    )


def drain(queue):
    while len(queue):
        head = next(iter(queue.heads()))
        queue.take(head)
        yield head.key


@given(st.permutations(range(8)))
def test_first_come_first_served_whenever_they_begin_to_wait(order):
    queue = Fcfs()
    for key in order:
        queue.add(request(key))
    assert len(list(queue.heads())) == 1
    assert list(drain(queue)) == sorted(order)


def test_a_fair_queue_gives_tenants_equal_tokens_and_keeps_each_ones_order():
    rng = random.Random(0)
    queue = FairFcfs(lambda request: request.adapter, quantum=100)
    costs = {}
    for key in range(400):  # tenant 0 asks nine times as often as tenant 1
        adapter = int(rng.random() < 0.1)
        costs[key] = adapter, rng.randint(50, 150)
        queue.add(request(key, adapter=adapter, cost=costs[key][1]))
    taken = list(drain(queue))
    assert sorted(taken) == list(range(400))
    for tenant in (0, 1):
        mine = [key for key in taken if costs[key][0] == tenant]
        assert mine == sorted(mine)
    last = max(place for place, key in enumerate(taken) if costs[key][0] == 1)
    got = [sum(costs[key][1] for key in taken[: last + 1] if costs[key][0] == tenant) for tenant in (0, 1)]
    assert abs(got[0] - got[1]) <= 400


def test_a_fair_queues_head_is_not_passed_and_who_was_evicted_goes_first():
    queue = FairFcfs(lambda request: {0: 7, 1: 7}.get(request.adapter, request.adapter), {7: 2.0}.get)
    for key in range(3):
        queue.add(request(key, adapter=key % 2))
    assert [one.key for one in queue.heads()] == [0] == [one.key for one in queue.heads()]
    queue.add(request(9, arrival=-1, placed=True))
    assert len(queue) == 4
    assert list(drain(queue)) == [9, 0, 1, 2]


def test_who_leaves_a_fair_queue_does_so_at_once_wherever_it_waits():
    queue = FairFcfs(lambda request: request.adapter, quantum=100)
    first, *others = (request(key) for key in range(3))
    evicted = [request(key, arrival=key - 9, placed=True) for key in (7, 8, 9)]
    for one in (first, *others):
        queue.add(one)
    assert list(queue.heads()) == [first]  # its turn has come
    for one in evicted:
        queue.add(one)
    for left, gone in enumerate((evicted[1], first, others[0]), start=1):
        assert queue.remove(gone) and not queue.remove(gone)
        assert len(queue) == 6 - left
    assert list(drain(queue)) == [7, 9, 2]


def test_who_leaves_when_its_turn_has_come_is_not_charged():
    queue = FairFcfs(lambda request: request.adapter, quantum=100)
    for key in range(4):
        queue.add(request(key, adapter=key % 2, cost=100))
    (head,) = queue.heads()
    assert queue.remove(head)
    assert [key for key, _ in zip(drain(queue), range(2), strict=False)] == [2, 1]


def test_of_each_adapter_the_oldest_may_be_next():
    queue = FcfsEach()
    for key, adapter in enumerate((3, 3, 5, 4, 5)):
        queue.add(request(key, adapter=adapter))
    assert [one.key for one in queue.heads()] == [0, 2, 3]
    queue.take(list(queue.heads())[1])
    assert [one.key for one in queue.heads()] == [0, 3, 4]
    assert len(queue) == 4
