"""The policy: what the paper says, and what must hold for any fleet."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import ConfigError
from lorakit.scheduler.fleet import Fleet
from lorakit.scheduler.policy import Policy as AnyPolicy
from lorakit.scheduler.policy import consolidate, fits, may_release, newest, route, scale_up
from lorakit.scheduler.snapshot import Limits, ReplicaView, RequestView

# The paper's: a lightly loaded GPU is kept, and one is asked for as soon as a request waits.
Policy = partial(AnyPolicy, headroom=1, ask_at=1, linger=0.0, spare=0)
LIMITS = Limits(batch=4, blocks=20, block_tokens=16)


def requests(first, count, tokens=16, adapter=0, rank=16):
    return tuple(RequestView(key, float(key), tokens, adapter, rank) for key in range(first, first + count))


def replica(number, count, *, tokens=16, free=None, adapter=0, residents=()):
    held = requests(100 * number, count, tokens, adapter)
    left = LIMITS.blocks - count * LIMITS.blocks_of(tokens) if free is None else free
    return ReplicaView(number, held, left, frozenset(residents))


@st.composite
def fleets(draw, most=8, batch=6, blocks=40):
    limits = Limits(batch, blocks, 16)
    found, key = [], 0
    for number in sorted(draw(st.sets(st.integers(0, 30), max_size=most))):
        held, left = [], blocks
        for tokens in draw(st.lists(st.integers(1, 120), max_size=batch)):
            # No replica is full beyond what the policy lets in.
            if left < limits.blocks_of(tokens) + len(held) + 1:
                break
            left -= limits.blocks_of(tokens)
            adapter = draw(st.integers(0, 5))
            held.append(RequestView(key, draw(st.floats(0, 9)), tokens, adapter, (16, 8, 64)[adapter % 3]))
            key += 1
        found.append(ReplicaView(number, tuple(held), left, draw(st.frozensets(st.integers(0, 5)))))
    return limits, found


policies = st.builds(
    Policy,
    light=st.sampled_from([0.25, 0.75, 1.0]),
    headroom=st.integers(0, 2),
    consolidate_below=st.sampled_from([0.5, 1.0]),
    spare=st.integers(0, 3),
    move_tokens=st.sampled_from([50, 10_000]),
    affinity=st.booleans(),
    affinity_slack=st.integers(0, 2),
    rank_budget=st.sampled_from([None, 30, 90]),
)
asked = st.builds(
    RequestView, st.just(10_000), st.just(99.0), st.integers(1, 200), st.integers(0, 5), st.sampled_from([8, 16, 64])
)


def test_route_takes_the_largest_working_set_and_then_the_highest_id():
    request = RequestView(1, 0.0, 16)
    fleet = Fleet.of(4, [replica(0, 3), replica(1, 1), replica(2, 3), replica(3, 4)])
    assert route(fleet, request, LIMITS, Policy()) == 2
    fleet = Fleet.of(4, [replica(0, 3), replica(1, 1), replica(2, 3, free=4), replica(3, 4)])
    assert route(fleet, request, LIMITS, Policy()) == 0  # 2 has 4 blocks; 1 + 3 + 1 are wanted
    assert route(fleet, request, LIMITS, Policy(), among=0b1010) == 1
    assert route(Fleet.of(4, [replica(3, 4)]), request, LIMITS, Policy()) is None
    assert route(Fleet(4), request, LIMITS, Policy()) is None


def test_affinity_prefers_a_holder_among_equals_and_within_the_slack():
    request = RequestView(1, 0.0, 16, adapter=7)
    fleet = Fleet.of(4, [replica(0, 1, residents=[7]), replica(1, 2, residents=[7]), replica(2, 2), replica(3, 3)])
    assert route(fleet, request, LIMITS, Policy()) == 3
    assert route(fleet, request, LIMITS, Policy(affinity=True)) == 3
    assert route(fleet, request, LIMITS, Policy(affinity=True, affinity_slack=1)) == 1
    fleet = Fleet.of(4, [replica(0, 1, residents=[7]), replica(1, 2, residents=[7]), replica(2, 2)])
    assert route(fleet, request, LIMITS, Policy()) == 2
    assert route(fleet, request, LIMITS, Policy(affinity=True)) == 1


def test_a_rank_budget_counts_each_adapter_once():
    limits = Limits(8, 100, 16)
    held = ReplicaView(0, requests(0, 3, adapter=1, rank=64), 90)
    policy = Policy(rank_budget=80)
    assert fits(held, RequestView(9, 0.0, 16, adapter=1, rank=64), limits, policy)
    assert fits(held, RequestView(9, 0.0, 16, adapter=2, rank=16), limits, policy)
    assert not fits(held, RequestView(9, 0.0, 16, adapter=2, rank=17), limits, policy)
    assert fits(ReplicaView(1), RequestView(9, 0.0, 16, rank=128), limits, policy)


@given(fleets(), asked, policies)
def test_route_is_never_over_capacity_and_takes_the_fullest(drawn, request, policy):
    limits, replicas = drawn
    found = route(Fleet.of(limits.batch, replicas), request, limits, policy)
    able = [one for one in replicas if fits(one, request, limits, policy)]
    if found is None:
        assert not able
        return
    chosen = next(one for one in replicas if one.id == found)
    fullest = max(one.working_set for one in able)
    assert chosen in able
    assert chosen.working_set < limits.batch
    assert chosen.free_blocks - limits.blocks_of(request.tokens) >= chosen.working_set + 1
    if not policy.affinity:
        assert chosen == max(able, key=lambda one: (one.working_set, one.id))
    elif chosen.working_set < fullest:
        assert request.adapter in chosen.residents
        assert chosen.working_set >= fullest - policy.affinity_slack


def test_the_newest_goes():
    held = (RequestView(1, 5.0, 9), RequestView(2, 7.0, 9), RequestView(3, 7.0, 9), RequestView(4, 1.0, 9))
    assert newest(held).key == 3


def test_scale_up_when_no_lightly_loaded_gpu_is_left():
    policy = Policy(light=0.5, most=4)
    assert scale_up(Fleet.of(4, [replica(0, 4), replica(1, 2)]), 0, 0, LIMITS, policy) == 0
    full = Fleet.of(4, [replica(0, 4), replica(1, 3)])
    assert scale_up(full, 0, 0, LIMITS, policy) == 1
    assert scale_up(full, 1, 0, LIMITS, policy) == 0
    assert scale_up(full, 0, 5, LIMITS, policy) == 2  # 1 + ⌈5/4⌉, but 4 at most
    assert scale_up(full, 0, 5, LIMITS, Policy(light=0.5, most=4, ask_at=6)) == 1
    patient = Policy(light=0.5, most=9, headroom=0, backlog=2)
    assert [scale_up(full, 0, waiting, LIMITS, patient) for waiting in (0, 1, 8, 9, 17)] == [0, 1, 1, 2, 3]
    assert [scale_up(full, 1, waiting, LIMITS, patient) for waiting in (1, 8, 9, 17)] == [0, 0, 1, 2]
    assert scale_up(full, 0, 0, LIMITS, policy, draining=2) == 0
    # A small working set whose cache is nearly full is no light load.
    assert scale_up(Fleet.of(4, [replica(0, 2, free=9)]), 0, 0, LIMITS, policy) == 1
    assert scale_up(Fleet(4), 0, 0, LIMITS, Policy(headroom=0, least=2, most=4)) == 2


def test_release_leaves_the_headroom():
    policy = Policy(light=0.5)
    assert may_release(Fleet.of(4, [replica(0, 2), replica(1, 0)]), 1, 0, 0, LIMITS, policy)
    assert not may_release(Fleet.of(4, [replica(0, 3), replica(1, 0)]), 1, 0, 0, LIMITS, policy)
    assert not may_release(Fleet.of(4, [replica(0, 2), replica(1, 0)]), 1, 0, 1, LIMITS, policy)
    assert not may_release(Fleet.of(4, [replica(0, 2)]), 0, 0, 0, LIMITS, policy)
    assert not may_release(Fleet.of(4, [replica(1, 0)]), 1, 0, 0, LIMITS, policy)


def test_consolidation_by_hand():
    policy = Policy(light=1.0, headroom=1, consolidate_below=0.5)
    fleet = [replica(0, 1), replica(1, 2), replica(2, 3)]
    moves = consolidate(fleet, 0, LIMITS, policy)
    assert [(move.source, move.target) for move in moves] == [(0, 2)]
    # Without room for all of its requests a replica is left alone; so it is where a move costs more than its price.
    assert consolidate([replica(0, 2), replica(1, 3)], 0, LIMITS, policy) == []
    assert consolidate(fleet, 0, LIMITS, Policy(light=1.0, move_tokens=15)) == []
    assert consolidate(fleet, 0, LIMITS, Policy(light=0.5, headroom=2)) == []
    assert consolidate(fleet, 0, LIMITS, Policy(light=1.0, spare=3)) == []


@given(fleets(), policies, st.integers(0, 2))
def test_consolidation_never_overfills_and_comes_to_an_end(drawn, policy, starting):
    limits, replicas = drawn
    rounds = 0
    while moves := consolidate(replicas, starting, limits, policy):
        rounds += 1
        assert rounds <= len(replicas)
        before = {one.id: one for one in replicas}
        assert len({move.request.key for move in moves}) == len(moves)
        held = {one.id: list(one.held) for one in replicas}
        free = {one.id: one.free_blocks for one in replicas}
        for move in moves:
            assert before[move.source].working_set <= policy.consolidate_below * limits.batch
            blocks = limits.blocks_of(move.request.tokens)
            held[move.source].remove(move.request)
            free[move.source] += blocks
            # As it was moved, so it was: arrival, tokens and budget are the request's own.
            held[move.target].append(move.request)
            free[move.target] -= blocks
        sources = {move.source for move in moves}
        assert not sources & {move.target for move in moves}
        assert all(not held[source] for source in sources)
        for move in moves:
            target = move.target
            assert before[target].working_set > 0
            assert len(held[target]) <= limits.batch
            assert free[target] >= len(held[target])
            ranks = sum({one.adapter: one.rank for one in held[target]}.values())
            if policy.rank_budget is not None:
                assert ranks <= max(policy.rank_budget, before[target].ranks)
        replicas = [ReplicaView(one.id, tuple(held[one.id]), free[one.id], one.residents) for one in replicas]
        assert sum(1 for one in replicas if one.held) < sum(1 for one in before.values() if one.held)


@given(fleets(), st.data())
def test_the_fleets_index_follows_its_replicas(drawn, data):
    limits, replicas = drawn
    fleet = Fleet.of(limits.batch, replicas)
    sizes = {one.id: one.working_set for one in replicas}
    for number in data.draw(st.lists(st.sampled_from(sorted(sizes)), max_size=20)) if sizes else ():
        if number in fleet and data.draw(st.booleans()):
            sizes[number] = data.draw(st.integers(0, limits.batch))
            fleet.resize(number, sizes[number])
        elif number in fleet:
            fleet.remove(number)
            del sizes[number]
    room = [(size, number) for number, size in sizes.items() if size < limits.batch]
    found = [(size, number) for size, ids in fleet.fullest_first() for number in range(31) if ids >> number & 1]
    assert sorted(found) == sorted(room)
    assert [size for size, _ in fleet.fullest_first()] == sorted({size for size, _ in room}, reverse=True)
    assert [size for size, _ in fleet.emptiest_first()] == sorted({size for size, _ in room})
    for adapter in range(6):
        holding = {one.id for one in replicas if one.id in sizes and adapter in one.residents}
        assert {number for number in range(31) if fleet.holders(adapter) >> number & 1} == holding


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"light": 1.5}, "light is 1.5"),
        ({"headroom": -1}, "headroom is -1"),
        ({"most": 0}, "most is 0"),
        ({"least": 9, "most": 8}, "at least 9 replicas and at most 8"),
        ({"linger": float("nan")}, "linger is nan"),
        ({"consolidate_every": 0}, "consolidate_every is 0"),
        ({"rank_budget": 0}, "rank_budget is 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Policy(**settings)
    with pytest.raises(ConfigError, match="batch is 0"):
        Limits(batch=0)


def test_of_unlike_replicas_each_ones_own_limits_count():
    small, large = Limits(2, 8, 16), Limits(6, 100, 32)
    fleet = Fleet(1)
    held = ReplicaView(0, requests(0, 2), 6, limits=small), ReplicaView(1, requests(2, 1), 99, limits=large)
    for one in held:
        fleet.add(one)
    request = RequestView(9, 0.0, 64)
    assert route(fleet, request, LIMITS, Policy()) == 1  # the fuller one has no place
    assert route(fleet, request, LIMITS, Policy(), among=0b01) is None
    assert fits(ReplicaView(0, (), 5, limits=small), request, LIMITS, Policy())  # 4 blocks and 1 more
    assert not fits(ReplicaView(0, (), 4, limits=small), request, LIMITS, Policy())
    assert fits(ReplicaView(1, (), 3, limits=large), request, LIMITS, Policy())
    policy = Policy(light=1.0, consolidate_below=1.0, spare=0)
    (move,) = consolidate([held[1], ReplicaView(2, requests(3, 5), 50, limits=large)], 0, LIMITS, policy)
    assert (move.source, move.target) == (1, 2)  # beyond the four of `LIMITS`
    assert consolidate(held, 0, LIMITS, policy) == []
