"""The simulator agrees with one that goes forward by forward, and with what can be reckoned by hand."""

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stepwise import Reference

from lorakit import workloads
from lorakit.errors import ConfigError
from lorakit.scheduler.bound import least_gpu_time
from lorakit.scheduler.costs import SECOND, Costs
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.queues import Fcfs
from lorakit.scheduler.schemes import SCHEMES, Autoscaler, Punica, make_scheme
from lorakit.scheduler.simulator import Hardware, _Simulation, simulate
from lorakit.scheduler.snapshot import Limits
from lorakit.workloads import Asked

MS = SECOND // 1000
COSTS = Costs(
    step=6 * MS, row=20_000_003, context=181_001, lora=437_000_009, rank=1_391_003, prompts=11 * MS, prompt=20_000_011,
    load=1_671_000_017, start=3 * SECOND,
)  # fmt: skip


def drawn(rng, requests, rate, adapters=12, longest=300):
    arrivals = workloads.gamma_arrivals(requests, rate, rng, cv=2.0)
    chosen = workloads.power_law(requests, adapters, 0.7, rng)
    return workloads.trace(
        arrivals, chosen, lambda one: (one.randint(1, longest), one.randint(1, longest)), rng
    )  # fmt: skip


@given(
    seed=st.integers(0, 2**32),
    requests=st.integers(1, 60),
    rate=st.sampled_from([3.0, 20.0, 200.0]),
    batch=st.sampled_from([1, 3, 8]),
    block_tokens=st.sampled_from([1, 7, 16]),
    tightness=st.sampled_from([1.1, 1.5, 2.0, 20.0]),
    headroom=st.integers(0, 2),
    light=st.sampled_from([0.3, 0.75, 1.0]),
    ask_at=st.sampled_from([1, 4]),
    backlog=st.sampled_from([1, 3]),
    linger=st.sampled_from([0.0, 0.7]),
    every=st.sampled_from([None, 0.07, 0.31, 2.03]),
    spare=st.sampled_from([0, 6]),
    affinity=st.booleans(),
    budget=st.sampled_from([None, 48]),
    budget_of_prompts=st.sampled_from([64, 8192]),
)
# A cache is full sooner from when a place in it is kept for a request that is to be moved there.
@example(
    seed=50, requests=50, rate=3.0, batch=8, block_tokens=16, tightness=2.0, headroom=0, light=0.3, ask_at=4, backlog=3,
    linger=0.0, every=2.03, spare=0, affinity=False, budget=None, budget_of_prompts=64,
)  # fmt: skip
# A request that is moved has generated a token more when it comes, for which there is no block.
@example(
    seed=2607353214, requests=50, rate=3.0, batch=3, block_tokens=16, tightness=1.5, headroom=1, light=0.75, ask_at=1,
    backlog=3, linger=0.0, every=0.07, spare=0, affinity=False, budget=None, budget_of_prompts=8192,
)  # fmt: skip
@pytest.mark.slow
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_simulation_forward_by_forward(
    seed, requests, rate, batch, block_tokens, tightness, headroom, light, ask_at, backlog, linger, every, spare,
    affinity, budget, budget_of_prompts,
):  # fmt: skip
    rng = random.Random(seed)
    trace = drawn(rng, requests, rate)
    longest = max(one.prompt_tokens + one.new_tokens for one in trace)
    limits = Limits(batch, int(tightness * -(-longest // block_tokens)) + 2, block_tokens)
    policy = Policy(
        most=4, headroom=headroom, light=light, ask_at=ask_at, backlog=backlog, linger=linger, look_every=0.93,
        consolidate_every=every, consolidate_below=1.0, spare=spare, affinity=affinity, affinity_slack=1,
        rank_budget=budget,
    )  # fmt: skip
    costs = Costs(**{**vars(COSTS), "prompt_budget": budget_of_prompts})
    hardware = Hardware(costs, slots=batch + 1, ranks=(16, 8, 64))
    found = simulate(trace, Punica(policy, limits), hardware, sample=None)
    expected = Reference(trace, policy, limits, costs, batch + 1, hardware.ranks).run()
    assert found.finished == [expected.finished[key] for key in range(requests)]
    assert [job.first for job in found.jobs] == [expected.requests[key].times[0] for key in range(requests)]
    assert found.gpu_time == expected.gpu_time
    assert (found.moves, found.evictions) == (expected.moves, expected.evictions)
    assert (found.counts.loads, found.counts.forwards) == (expected.loads, expected.forwards)
    # The budget of new tokens goes on wherever a request was moved to.
    assert all(len(one.times) == one.new_tokens for one in expected.requests.values())
    assert found.gpu_time >= least_gpu_time(trace, costs, limits, hardware.ranks)


def test_what_is_compared_moves_and_evicts():
    """The draws above reach what they are to compare."""
    trace = drawn(random.Random(5), 60, 8.0)
    policy = Policy(
        most=4,
        headroom=1,
        ask_at=1,
        linger=0.0,
        spare=0,
        look_every=0.93,
        consolidate_every=0.31,
        consolidate_below=1.0,
    )
    for blocks, reached in ((60, "evictions"), (400, "moves")):
        found = simulate(trace, Punica(policy, Limits(8, blocks, 16)), Hardware(COSTS, slots=9), sample=None)
        assert getattr(found, reached) > 3


def test_one_request_by_hand():
    costs = Costs(step=100, row=10, context=1, lora=5, rank=2, prompts=50, prompt=3, load=7, start=0)
    limits = Limits(4, 100, 16)
    scheme = Punica(Policy(most=1, consolidate_every=None), limits)
    found = simulate([Asked(0.0, 0, 20, 3)], scheme, Hardware(costs, slots=4, ranks=(4,)), sample=None, gaps=True)
    adapter = 5 + 2 * 4
    first = 7 + (100 + adapter + 50 + 3 * 20)  # load, then the prompt
    second, third = 100 + 10 + 21 + adapter, 100 + 10 + 22 + adapter
    assert found.jobs[0].first == first
    assert found.finished == [first + second + third]
    assert found.gpu_time == found.finished[0]
    assert [tuple(gap) for gap in found.counts.gaps] == [(second, 1, 2, 1)]


def test_a_later_request_joins_at_a_boundary_by_hand():
    costs = Costs(step=100, row=10, context=1, lora=0, rank=0, prompts=50, prompt=1, load=0, start=0)
    scheme = Punica(Policy(most=1, consolidate_every=None), Limits(4, 100, 16))
    trace = [Asked(0.0, 0, 10, 5), Asked(200 / SECOND, 0, 10, 1)]
    found = simulate(trace, scheme, Hardware(costs, slots=4), sample=None)
    first = 100 + 50 + 10
    boundary = first + (100 + 10 + 11)  # 281, the first one after 200
    joined = boundary + (100 + 10 + 12 + 50 + 10)
    assert found.jobs[0].first == first
    assert found.finished[1] == joined
    assert found.finished[0] == joined + (100 + 10 + 13) + (100 + 10 + 14)


def test_an_evicted_request_keeps_its_arrival_and_budget_and_is_the_newest():
    limits = Limits(8, 24, 16)
    policy = Policy(most=1, consolidate_every=None)
    trace = [Asked(0.0, 0, 100, 120), Asked(0.001, 1, 100, 120), Asked(0.5, 2, 30, 100)]
    found = simulate(trace, Punica(policy, limits), Hardware(COSTS, slots=8), sample=None)
    assert found.evictions and not found.jobs[0].evictions
    assert found.finished[0] < found.finished[1]
    assert sum(job.new_tokens for job in found.jobs) == 340
    assert all(job.arrival == round(one.arrival * SECOND) for job, one in zip(found.jobs, trace, strict=True))


@pytest.mark.parametrize("blocks", [60, 2000])
def test_nobody_passes_an_older_request_and_no_replica_is_overfull(monkeypatch, blocks):
    """Whoever is given a place is the oldest of those that wait; what is given keeps within places and blocks."""
    limits = Limits(8, blocks, 16)
    waiting, given, give, add = {}, [], _Simulation._give, Fcfs.add

    def give_(self, job, number):
        replica = self._replicas[number]
        assert replica.working_set < limits.batch
        assert replica.free_blocks >= limits.blocks_of(job.tokens) + replica.working_set + 1
        assert all((job.arrival, job.key) <= (one.arrival, one.key) for one in waiting.values())
        waiting.pop(job.key, None)
        given.append(job.key)
        give(self, job, number)

    def add_(self, job):
        waiting[job.key] = job
        add(self, job)

    monkeypatch.setattr(_Simulation, "_give", give_)
    monkeypatch.setattr(Fcfs, "add", add_)
    trace = drawn(random.Random(7), 200, 60.0)
    found = simulate(trace, Punica(Policy(most=3), limits), Hardware(COSTS, slots=9), sample=None)
    assert not waiting and set(given) == set(range(200))
    assert len(given) == 200 + found.evictions and (found.evictions > 0) == (blocks == 60)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("autoscaler", [None, Autoscaler(target=4.0, down_delay=5.0)])
def test_every_scheme_serves_every_request_and_repeats(name, autoscaler):
    trace = drawn(random.Random(5), 150, 30.0)
    limits = Limits(8, 200, 16)

    def play():
        scheme = make_scheme(name, Policy(most=4), limits, autoscaler, seed=1)
        return simulate(trace, scheme, Hardware(COSTS, slots=16), sample=0.5)

    found, again = play(), play()
    assert found.finished == again.finished and found.gpu_time == again.gpu_time
    assert min(found.finished) > 0 and found.most <= 4
    assert all(size <= 8 for sample in found.samples for size in sample.working_sets.values())
    assert max(sample.gpus for sample in found.samples) <= 4
    assert found.gpu_time >= least_gpu_time(trace, COSTS, limits)


def test_requests_that_can_never_be_served_are_refused():
    scheme = make_scheme("punica", Policy(), Limits(4, 10, 16), None)
    with pytest.raises(ConfigError, match=r"request 1 of the trace has 100 \+ 60 tokens, and a replica's cache 10"):
        simulate([Asked(0, 0, 1, 1), Asked(0, 0, 100, 60)], scheme, Hardware(COSTS))
    with pytest.raises(ConfigError, match="no request"):
        simulate([], scheme, Hardware(COSTS))
    with pytest.raises(ConfigError, match="room for 2 adapters, and a batch may have 4"):
        simulate([Asked(0, 0, 1, 1)], scheme, Hardware(COSTS, slots=2))
    with pytest.raises(ConfigError, match="ranks are"):
        Hardware(COSTS, ranks=())
    with pytest.raises(ConfigError, match="no scheme 'best'; there are punica"):
        make_scheme("best", Policy(), Limits(), None)
