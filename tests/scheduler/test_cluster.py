"""The cluster's promises, on replicas in this process: what it gives is what one engine gives, whatever happens."""

import asyncio
import operator
import random
import threading
import time

import pytest
from architectures import ARCHITECTURES, METHODS, adapt
from clusters import ADAPTERS, long, spread, submitted, wait_until
from in_process import InProcess
from served import SMALL, Asked, alone, config, double, family, requests
from tiny_engines import text

import lorakit
from lorakit import AdapterBank, MultiLoraModel
from lorakit.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineBusyError,
    EngineCrashedError,
    EngineError,
    EngineStoppedError,
    RequestError,
    SupersededError,
)
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.policy import Policy

QUICK = Policy(linger=0.2, look_every=0.1, consolidate_every=None, ask_at=1, backlog=1, least=1, most=3, spare=0)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    base, tenants = family()
    return lorakit.export(tenants, tmp_path_factory.mktemp("cluster") / "bank", base_model=base)


@pytest.fixture(scope="module")
def model(bank):
    return MultiLoraModel(double(), bank)


@pytest.fixture
def started(bank, tmp_path, request):
    """Starts clusters; what they leave behind is looked at in the end."""
    clusters = []

    def start(policy=QUICK, engine=SMALL, beside=None, lease=60.0, prepare=lambda links: None, **settings):
        catalog = Catalog(bank, family()[0])
        links = InProcess(lambda: MultiLoraModel(double()), catalog, engine, beside, lease)
        prepare(links)
        options = {"beat": 0.1, "silence": 5.0, "start_timeout": 60.0} | settings
        base = double()
        cluster = Cluster(
            links,
            catalog,
            base.config,
            policy,
            ClusterConfig(**options),
            generation_config=base.generation_config,
            decode=text,
        )
        clusters.append((cluster, links))
        cluster.start()
        return cluster, links

    yield start
    for cluster, _ in clusters:
        cluster.close()


def at_rest(cluster, links):
    """Nothing is left anywhere, and all that is counted is nothing."""
    wait_until(lambda: not cluster.stats().open and not cluster._dispatcher._flights)
    wait_until(lambda: all(not link.worker._rows for link in links.serving))
    wait_until(lambda: not cluster._tenants.waiting and not cluster._tenants._running)
    wait_until(lambda: all(not replica.working_set for replica in cluster._dispatcher._presence.replicas.values()))
    assert not any(cluster._dispatcher._fleet.sizes[1:])
    assert not cluster.model._held and not cluster.model._leaving
    for link in links.serving:
        assert not link.worker.engine.stats().open


def slowly(links):
    """Has forwards take long enough for something to happen meanwhile."""
    for link in links.serving:
        link.worker.engine.model.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))


def cache_of(blocks):
    """The bytes of a cache of so many blocks."""
    from lorakit.engine.batching import blocks_in

    base, nbytes = double(), 1 << 10
    while blocks_in(nbytes, base, SMALL.page_size, SMALL.max_batch_tokens) < blocks:
        nbytes += 1 << 10
    return nbytes


def test_three_replicas_give_what_a_request_gives_alone(started, model):
    asked = requests(40, ADAPTERS)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=3, most=3, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 3)
    handles = submitted(cluster, asked)
    assert [handle.result(60).token_ids for handle in handles] == expected
    stats = cluster.stats()
    assert stats.replicas == 3 and stats.state == "ready"
    assert sum(usage.generated_tokens for usage in stats.tenants.values()) == sum(map(len, expected))
    at_rest(cluster, links)


def test_what_moves_goes_on_where_it_stopped(started, model):
    asked = long(5)
    expected = [alone(model, one) for one in asked]
    sampled = {"temperature": 1.0, "seed": 7}
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 2)
    whole = [handle.result(60).token_ids for handle in submitted(cluster, asked, **sampled)]

    def move_all():
        for flights in list(cluster._dispatcher._flights.values()):
            for flight in flights:
                others = [number for number in cluster._dispatcher._presence.replicas if number != flight.replica]
                if flight.begun and not flight.leaving:
                    cluster._dispatcher._move(flight, others[0])

    for settings, wanted in (({}, expected), (sampled, whole)):
        handles = submitted(cluster, asked, **settings)
        moves = 0
        while not all(handle.done for handle in handles):
            flights = [flight for handle in handles for flight in handle.parts]
            cluster._dispatcher._loop.call(move_all)
            time.sleep(0.02)
            moves = max(moves, sum(flight.moves for flight in flights))
        assert [handle.result(60).token_ids for handle in handles] == wanted
        assert moves >= len(asked)
        assert all(tuple(token.id for token in handle) == row for handle, row in zip(handles, wanted, strict=True))
    at_rest(cluster, links)


@pytest.mark.parametrize("seed", range(3))
def test_a_replica_dies_and_its_requests_end_elsewhere(started, model, seed):
    asked = long(10, seed)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 2)
    handles = submitted(cluster, asked)
    rng = random.Random(seed)
    for _ in range(2):
        next(iter(handles[rng.randrange(len(handles))]))
        time.sleep(0.1 * rng.random())
        rng.choice(links.serving).killed = True
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert [tuple(token.id for token in handle) for handle in handles] == expected
    wait_until(lambda: cluster.stats().replicas == 2)
    at_rest(cluster, links)


def test_a_replica_that_hangs_is_given_up(started, model):
    asked = long(6)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None), silence=1.5)
    wait_until(lambda: cluster.stats().replicas == 2)
    handles = submitted(cluster, asked)
    next(iter(handles[0]))
    hanging = links.links[cluster._dispatcher._presence.replicas[handles[0].parts[0].replica].name]
    hanging.hangs = True
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert hanging.killed
    at_rest(cluster, links)


def test_a_replica_that_hangs_is_given_up_by_a_server_that_is_often_held_up(started, model):
    asked = long(6)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None, look_every=0.1), silence=2.0)
    wait_until(lambda: cluster.stats().replicas == 2)
    held_up = threading.Event()

    def hold_up():
        if not held_up.is_set():
            time.sleep(1.2)  # longer than half of the silence, between any two looks
            cluster._dispatcher._loop.call(cluster._dispatcher._loop.later, 0.05, hold_up)

    handles = submitted(cluster, asked)
    next(iter(handles[0]))
    hanging = links.links[cluster._dispatcher._presence.replicas[handles[0].parts[0].replica].name]
    hanging.hangs = True
    cluster._dispatcher._loop.call(hold_up)
    try:
        assert [handle.result(40).token_ids for handle in handles] == expected
    finally:
        held_up.set()
    assert hanging.killed
    at_rest(cluster, links)


def test_what_kills_every_replica_fails_by_its_cause(started):
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None), tries=2)
    handle = cluster.submit([11, 12, 13], max_new_tokens=40, ignore_eos=True)
    for _ in range(2):
        wait_until(lambda: handle.done or handle.parts[0].begun)
        for link in links.serving:
            link.killed = True
        wait_until(lambda: handle.done or not handle.parts[0].begun)
    with pytest.raises(EngineCrashedError, match="2 replicas died"):
        handle.result(30)
    at_rest(cluster, links)


def test_sequences_of_one_request_that_kill_their_replicas_strand_nobody(started):
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None), tries=2)
    handle = cluster.submit([11, 12, 13], max_new_tokens=40, ignore_eos=True, temperature=1.0, n=3)
    beside = cluster.submit([11, 12, 13], "lora", max_new_tokens=40, ignore_eos=True)
    for _ in range(2):
        wait_until(lambda: handle.done or all(part.begun for part in (*handle.parts, *beside.parts)))
        for link in links.serving:
            link.killed = True
        wait_until(lambda: handle.done or not any(part.begun for part in handle.parts))
    for one in (handle, beside):
        with pytest.raises(EngineCrashedError, match="2 replicas died"):
            one.results(30)
    at_rest(cluster, links)


def test_a_replica_whose_engine_is_down_is_replaced(started, model):
    asked = long(4)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None))
    handles = submitted(cluster, asked)
    next(iter(handles[0]))
    (down,) = links.serving
    down.worker.engine._state = "dead"
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert down.killed and links.serving != [down]
    down.worker.engine._state = "ready"  # so that it can be closed
    at_rest(cluster, links)


def test_the_longest_request_that_is_taken_is_served(started):
    nbytes = cache_of(10)
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None), config(cache_memory=nbytes))
    room = cluster.capacity
    assert room < 64, "the model's positions are the limit, so nothing is tested"
    with pytest.raises(RequestError, match=f"holds {room}"):
        cluster.submit([11] * room, max_new_tokens=1)
    handles = [cluster.submit([11] * (room - 4), max_new_tokens=4, ignore_eos=True) for _ in range(3)]
    assert [len(handle.result(30).token_ids) for handle in handles] == [4] * 3
    at_rest(cluster, links)


def unlike(**configs):
    """Has replicas be set up by their names, as on GPUs of several kinds."""

    def prepare(links):
        alike = links.config_of
        links.config_of = lambda name: configs.get(name.replace("-", "_")) or alike(name)

    return prepare


def room_of(replica):
    """The most tokens that one sequence may have there."""
    return (replica.limits.blocks - 1) * replica.limits.block_tokens


@pytest.mark.parametrize("small", ["replica_0", "replica_1"])
def test_of_unlike_replicas_each_gets_what_it_holds(started, small):
    few = config(cache_memory=cache_of(10), max_requests=2)
    cluster, links = started(Policy(least=2, most=2, consolidate_every=0.1, spare=0), prepare=unlike(**{small: few}))
    wait_until(lambda: cluster.stats().replicas == 2)
    (little, large) = sorted(cluster._dispatcher.replicas, key=room_of)
    assert little.name == small.replace("_", "-") and room_of(large) > room_of(little)
    most = {little.id: 0, large.id: 0}

    def look():
        for replica in (little, large):
            most[replica.id] = max(most[replica.id], replica.working_set)

    presence = cluster._dispatcher._presence
    hear = presence._told.said

    def hear_and_look(*args):
        hear(*args)
        look()

    presence._told = presence._told._replace(said=hear_and_look)
    long_ones = [cluster.submit([11] * room_of(little), max_new_tokens=8, ignore_eos=True) for _ in range(8)]
    short_ones = [cluster.submit([11, 12], max_new_tokens=20, ignore_eos=True) for _ in range(8)]
    assert [len(handle.result(60).token_ids) for handle in long_ones] == [8] * 8
    assert [len(handle.result(60).token_ids) for handle in short_ones] == [20] * 8
    assert 1 <= most[little.id] <= 2 < most[large.id] <= 6
    at_rest(cluster, links)


def test_what_is_too_long_for_the_replicas_that_are_left_holds_nobody_up(started):
    few, more = config(cache_memory=cache_of(10)), config(cache_memory=cache_of(15))
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None), more, prepare=unlike(replica_0=few))
    wait_until(lambda: cluster.stats().replicas == 2)
    with pytest.raises(RequestError, match=f"holds {cluster.capacity}"):
        cluster.submit([11] * cluster.capacity, max_new_tokens=1)
    little = min(map(room_of, cluster._dispatcher.replicas))
    links.config_of = lambda name: few  # what comes in the place of the large one
    (large,) = (link for link in links.serving if link.name == "replica-1")
    slowly(links)
    begun = cluster.submit([11, 12, 13], max_new_tokens=little, ignore_eos=True)
    wait_until(lambda: begun.generated)
    large.killed = True
    wait_until(lambda: not begun.parts[0].begun)
    assert len(cluster.submit([11, 12], max_new_tokens=3, ignore_eos=True).result(30).token_ids) == 3
    with pytest.raises(EngineError, match=f"may have {little + 3} tokens, .* hold {little}"):
        begun.result(30)
    at_rest(cluster, links)


def test_a_request_that_does_not_arrive_is_sent_again(started, monkeypatch):
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None))
    give, fails = links.give, iter([True, False])

    async def flaky(given, choose):
        if next(fails, True):
            raise OSError("the network is down")
        return await give(given, choose)

    monkeypatch.setattr(links, "give", flaky)
    assert len(cluster.submit([11, 12], max_new_tokens=3, ignore_eos=True).result(30).token_ids) == 3
    with pytest.raises(EngineError, match="reached no replica.*the network is down"):
        cluster.submit([11, 12], max_new_tokens=3).result(30)
    monkeypatch.setattr(links, "give", give)
    assert len(cluster.submit([11, 12], max_new_tokens=3, ignore_eos=True).result(30).token_ids) == 3
    at_rest(cluster, links)


def test_an_adapter_that_loads_on_one_replica_only(started, model):
    asked = [Asked((11, 12, 13), "lora", 5)] * 6
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 2)
    good = links.serving[0].name
    links.broken = lambda replica, key: replica != good
    handles = submitted(cluster, asked)
    assert [handle.result(60).token_ids for handle in handles] == expected
    links.broken = lambda replica, key: True
    with pytest.raises(OSError, match="disk is broken"):
        cluster.submit((11, 12, 13), "dora", max_new_tokens=3).result(30)
    assert len(cluster.submit((11, 12, 13), max_new_tokens=3).result(30).token_ids) == 3
    at_rest(cluster, links)


def test_replicas_come_with_the_load_and_go_again(started, model):
    cluster, links = started()
    assert cluster.stats().replicas == 1
    asked = long(24)
    expected = [alone(model, one) for one in asked]
    handles = submitted(cluster, asked)
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert max(links.counts) == 3
    wait_until(lambda: cluster.stats().replicas == 1)
    wait_until(lambda: len([link for link in links.ended if link.gone]) == 2)
    at_rest(cluster, links)


@pytest.mark.parametrize("how", ["refused", "unanswered"])
def test_a_scale_call_that_is_lost_is_made_again(started, how):
    async def lost():
        if how == "refused":
            raise OSError("the network is down")
        await asyncio.sleep(1e6)

    cluster, links = started(Policy(least=1, most=2, linger=60.0, consolidate_every=None), silence=1.5)
    links.lost_scales += [lost, lost]
    cluster._dispatcher._loop.call(cluster._dispatcher._scale, 2)
    wait_until(lambda: cluster.stats().replicas == 2)
    assert not links.lost_scales and links.counts[-1] == 2
    at_rest(cluster, links)


def test_replicas_that_cannot_begin_are_not_waited_for(started):
    def cramped(links):
        links.room = 1

    cluster, links = started(prepare=cramped)
    asked = long(24)
    assert all(handle.result(60).token_ids for handle in submitted(cluster, asked))
    assert max(links.counts) == 3 and cluster.stats().replicas == 1
    wait_until(lambda: links.counts[-1] == 1)  # nobody waits, and they have not come
    links.room = 2
    assert all(handle.result(60).token_ids for handle in submitted(cluster, asked))
    wait_until(lambda: len(links.ended) == 1)  # one came, and went again
    at_rest(cluster, links)


def test_a_server_that_was_away_does_not_give_up_its_replicas(started, model):
    asked = long(6)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None), silence=2.0)
    wait_until(lambda: cluster.stats().replicas == 2)
    slowly(links)
    handles = submitted(cluster, asked)
    wait_until(lambda: all(handle.generated for handle in handles))

    def away():
        time.sleep(3)
        cluster._dispatcher._look_once(time.monotonic())  # before it hears what was told meanwhile

    before = list(links.serving)
    cluster._dispatcher._loop.call(away)
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert links.serving == before and not any(handle.parts[0].deaths for handle in handles)
    at_rest(cluster, links)


def test_who_is_cancelled_while_nobody_can_serve_waits_no_more(started):
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None))
    come, alike = threading.Event(), links.config_of
    links.config_of = lambda name: alike(name) if come.wait(30) else None
    slowly(links)
    handles = [cluster.submit([11, 12], max_new_tokens=40, ignore_eos=True) for _ in range(9)]
    wait_until(lambda: sum(handle.generated > 0 for handle in handles) == 6)
    links.serving[0].killed = True
    wait_until(lambda: cluster._tenants.waiting == 9)
    for handle in handles[1:]:
        handle.cancel()
    wait_until(lambda: cluster._tenants.waiting == 1)
    come.set()
    assert len(handles[0].result(60).token_ids) == 40
    at_rest(cluster, links)


def test_replicas_end_under_load(started, model):
    """Ray Serve picks who ends: its sequences move, and none is lost."""
    asked = long(6)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=3, most=3, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 3)
    handles = submitted(cluster, asked)
    wait_until(lambda: all(handle.generated for handle in handles))

    def shrink():
        spread(cluster, handles)
        cluster._dispatcher.policy = Policy(least=1, most=3, linger=60.0, consolidate_every=None, ask_at=100)
        cluster._dispatcher._scale(1)

    cluster._dispatcher._loop.call(shrink)
    assert [handle.result(60).token_ids for handle in handles] == expected
    wait_until(lambda: cluster.stats().replicas == 1)
    assert sum(handle.parts[0].moves for handle in handles) > 2
    at_rest(cluster, links)


def test_what_is_counted_never_falls(started):
    cluster, links = started(Policy(least=3, most=3, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 3)

    def counted():
        stats = cluster.stats()
        return (*stats.loads, stats.steps, stats.segments)

    handles = submitted(cluster, long(12))
    cluster._dispatcher._loop.call(spread, cluster, handles)
    assert all(handle.wait(60) for handle in handles)
    at_rest(cluster, links)
    done = [link.worker.engine.stats() for link in links.serving]
    wait_until(lambda: counted()[-2:] == (sum(one.steps for one in done), sum(one.segments for one in done)))
    before = counted()
    assert all(before[:-3]), before
    dies = links.serving[0]
    dies.killed = True
    wait_until(lambda: dies.name not in {replica.name for replica in cluster._dispatcher.replicas})
    assert all(map(operator.ge, counted(), before))
    cluster._dispatcher.policy = Policy(least=1, most=3, linger=60.0, consolidate_every=None)
    cluster._dispatcher._loop.call(cluster._dispatcher._scale, 1)
    wait_until(lambda: cluster.stats().replicas == 1)
    assert all(map(operator.ge, counted(), before))
    at_rest(cluster, links)


def test_what_a_drained_replica_did_last_is_counted(started):
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None), beat=60.0)
    wait_until(lambda: cluster.stats().replicas == 2)
    assert cluster.submit([11, 12], "lora", max_new_tokens=5, ignore_eos=True).result(30)
    at_rest(cluster, links)
    done = sum(link.worker.engine.stats().steps for link in links.serving)
    assert done
    cluster._dispatcher.policy = Policy(least=1, most=2, linger=60.0, consolidate_every=None)
    links.first_to_go = max(links.serving, key=lambda link: link.worker.engine.stats().steps).name
    cluster._dispatcher._loop.call(cluster._dispatcher._scale, 1)
    wait_until(lambda: cluster.stats().replicas == 1)
    wait_until(lambda: cluster.stats().steps == done)


def test_lightly_loaded_replicas_empty_out(started, model):
    asked = long(4)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None, spare=0))
    wait_until(lambda: cluster.stats().replicas == 2)
    handles = submitted(cluster, asked)
    wait_until(lambda: all(handle.generated for handle in handles))
    wide = Policy(least=1, most=2, consolidate_every=0.1, spare=0, consolidate_below=0.9, look_every=0.1)

    def apart():
        spread(cluster, handles)
        cluster._dispatcher.policy = wide

    cluster._dispatcher._loop.call(apart)
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert sum(handle.parts[0].moves for handle in handles) >= 2
    at_rest(cluster, links)


def test_a_full_cache_evicts_the_newest_and_all_give_the_same(started, model):
    asked = long(8, seed=3)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None), config(cache_memory=cache_of(48)))
    handles = submitted(cluster, asked)
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert sum(handle.parts[0].evictions for handle in handles) > 0
    at_rest(cluster, links)


def test_stops_logprobs_and_several_sequences(started, model):
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None))
    with lorakit.Engine(model, SMALL, decode=text) as engine:
        for settings in (
            {"max_new_tokens": 20, "logprobs": True, "top_logprobs": 2},
            {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "n": 4, "ignore_eos": True},
            {"max_new_tokens": 20, "temperature": 1.0, "seed": 5, "stop": ["1", "2"]},
        ):
            one = engine.submit([11, 12, 13], "lora", **settings).results(60)
            many = cluster.submit([11, 12, 13], "lora", **settings).results(60)
            assert [each.token_ids for each in many] == [each.token_ids for each in one]
            assert [(each.finish_reason, each.stop) for each in many] == [
                (each.finish_reason, each.stop) for each in one
            ]
            if "logprobs" in settings:
                assert many[0].logprobs == pytest.approx(one[0].logprobs)
                assert [[top.id for top in place] for place in many[0].top_logprobs] == [
                    [top.id for top in place] for place in one[0].top_logprobs
                ]
            assert all(each.queued is not None and each.times == tuple(sorted(each.times)) for each in many)
    at_rest(cluster, links)


def test_a_second_server_is_refused_and_touches_nothing(started):
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None))
    with pytest.raises(EngineBusyError, match="another server"):
        started(Policy(least=1, most=1, consolidate_every=None), beside=links)
    assert links.serving and not links.ended
    assert len(cluster.submit([11, 12, 13], max_new_tokens=3).result(30).token_ids) == 3
    at_rest(cluster, links)


def test_a_server_that_was_away_while_another_took_over_stops_and_touches_nothing(started, model):
    asked = long(4)
    expected = [alone(model, one) for one in asked]
    first, old = started(Policy(least=2, most=2, consolidate_every=None), lease=0.5)
    wait_until(lambda: first.stats().replicas == 2)
    cut = submitted(first, [Asked((11, 12, 13), "lora", 60)] * 2)
    awake = threading.Event()
    first._dispatcher._loop.call(awake.wait)  # its loop stands still, as of a process that was stopped
    time.sleep(1.0)
    second, links = started(Policy(least=2, most=2, consolidate_every=None), beside=old)
    wait_until(lambda: second.stats().replicas == 2)
    handles = submitted(second, asked)
    there = list(links.serving)

    def scale():  # all that it would have done by what it knows
        dispatcher = first._dispatcher
        dispatcher._scale(1)
        for replica in dispatcher._presence.replicas.values():
            replica.link.kill()
            dispatcher._loop.spawn(replica.link.let_go())
            dispatcher._loop.spawn(replica.link.cancel(range(100)))
            dispatcher._loop.spawn(replica.link.forget(replica.link._worker.engine.model.adapters))

    first._dispatcher._loop.call(scale)
    first._dispatcher.policy = Policy(least=1, most=2, consolidate_every=None)
    awake.set()
    for handle in cut:
        with pytest.raises(SupersededError, match="taken over"):
            handle.result(30)
    assert first.state == "dead"
    with pytest.raises(SupersededError, match="taken over"):
        first.submit([11, 12, 13])
    first.close()
    assert [handle.result(60).token_ids for handle in handles] == expected
    assert links.serving == there and set(links.counts) == {2} and not links.ended
    assert not any(handle.parts[0].deaths + handle.parts[0].moves for handle in handles)
    at_rest(second, links)


def test_a_replica_whose_engine_begins_anew_is_met_later(started, monkeypatch):
    """It says that it is busy, which is not what a second server is told."""
    from lorakit.scheduler import presence
    from lorakit.scheduler.worker import Worker

    monkeypatch.setattr(presence, "_MEET_AGAIN", 0.1)
    hello, met = Worker.hello, []

    def hello_in_between(worker, term):
        met.append(term)
        worker.engine._state = "restarting" if len(met) < 3 else "ready"
        return hello(worker, term)

    monkeypatch.setattr(Worker, "hello", hello_in_between)
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None))
    assert len(met) == 3
    assert len(cluster.submit([11, 12, 13], max_new_tokens=3).result(30).token_ids) == 3
    at_rest(cluster, links)


def test_errors_come_before_any_work(started):
    cluster, links = started(Policy(least=1, most=1), max_waiting=2)
    with pytest.raises(AdapterNotFoundError, match="lara"):
        cluster.submit([11, 12], "lara")
    with pytest.raises(RequestError, match="positions"):
        cluster.submit([11] * 500)
    with pytest.raises(TypeError, match="temprature"):
        cluster.submit([11], temprature=1)
    with pytest.raises(RequestError, match="max_waiting is 2"):
        cluster.submit([11], temperature=1.0, n=3)
    running = [cluster.submit([11, 12], max_new_tokens=50, ignore_eos=True) for _ in range(1)]
    with pytest.raises(EngineBusyError) as caught:
        for _ in range(20):
            running.append(cluster.submit([11, 12], max_new_tokens=50, ignore_eos=True))
    assert caught.value.retry_after >= 1
    for handle in running:
        handle.cancel()
        assert handle.result(0).finish_reason == "cancelled"
    at_rest(cluster, links)
    with pytest.raises(DeadlineExceededError, match="of up to 50"):
        cluster.submit([11, 12], max_new_tokens=50, ignore_eos=True, deadline=0.05).result(10)
    at_rest(cluster, links)
    cluster.close()
    with pytest.raises(EngineStoppedError):
        cluster.submit([11])


def test_adapters_come_change_and_go_under_load(started, bank, model, tmp_path):
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 2)
    _, tenants = family()
    prompt = (11, 12, 13)
    own = {name: alone(model, Asked(prompt, name, 8)) for name in ("lora", "rslora", None)}
    assert own["lora"] != own["rslora"]
    cluster.model.load_adapter("new", tenants["lora"])
    with pytest.raises(AdapterExistsError):
        cluster.model.load_adapter("new", tenants["rslora"])
    assert cluster.submit(prompt, "new", max_new_tokens=8).result(30).token_ids == own["lora"]
    cluster.model.pin_adapter("new")
    wait_until(lambda: all(link.worker.engine.model.pinned for link in links.serving))
    cluster.model.load_adapter("new", tenants["rslora"], replace=True)
    assert cluster.submit(prompt, "new", max_new_tokens=8).result(30).token_ids == own["rslora"]
    assert cluster.model.pinned == {"new"}
    cluster.model.unload_adapter("new")
    with pytest.raises(AdapterNotFoundError):
        cluster.submit(prompt, "new")
    wait_until(lambda: not any("new" in name for link in links.serving for name in link.worker.engine.model.adapters))
    cluster.model.load_adapter("lora", tenants["rslora"], replace=True)  # in the place of the bank's
    assert cluster.submit(prompt, "lora", max_new_tokens=8).result(30).token_ids == own["rslora"]
    cluster.model.unload_adapter("lora")
    assert "lora" not in cluster.model.adapters
    cluster.model.load_adapter("lora")
    assert cluster.submit(prompt, "lora", max_new_tokens=8).result(30).token_ids == own["lora"]
    assert AdapterBank.open(bank.path).names == bank.names
    at_rest(cluster, links)


@pytest.mark.parametrize("end", ["unload", "replace"])
@pytest.mark.parametrize("how", ["dies", "moves"])
def test_what_has_begun_keeps_its_adapter_wherever_it_goes(started, how, end):
    base, tenants = family()
    new = adapt(base, 77, **METHODS["lora"](ARCHITECTURES["llama"]))  # the bank has none of this content
    by_itself = MultiLoraModel(double())
    by_itself.load_adapter("new", new)
    expected = alone(by_itself, Asked((11, 12, 13), "new", 60))
    cluster, links = started(Policy(least=2, most=2, consolidate_every=None))
    wait_until(lambda: cluster.stats().replicas == 2)
    cluster.model.load_adapter("new", new)
    slowly(links)
    handles = submitted(cluster, [Asked((11, 12, 13), "new", 60)] * 3)
    wait_until(lambda: all(handle.generated for handle in handles))
    if end == "unload":
        cluster.model.unload_adapter("new")
        with pytest.raises(AdapterNotFoundError):
            cluster.submit((11, 12, 13), "new")
    else:
        cluster.model.load_adapter("new", tenants["rslora"], replace=True)
    here = handles[0].parts[0].replica
    (there,) = cluster._dispatcher._presence.replicas.keys() - {here}
    if how == "dies":
        links.links[cluster._dispatcher._presence.replicas[here].name].killed = True
    else:
        for handle in handles:
            cluster._dispatcher._loop.call(cluster._dispatcher._move, handle.parts[0], there)
    assert [handle.result(60).token_ids for handle in handles] == [expected] * 3
    assert any(handle.parts[0].moves + handle.parts[0].deaths for handle in handles), "nothing moved"
    key = handles[0].parts[0].known.name
    wait_until(lambda: not any(key in link.worker.engine.model.adapters for link in links.serving))
    wait_until(lambda: not any(key in replica.knows for replica in cluster._dispatcher.replicas))
    wait_until(lambda: len(list(cluster.model.folders[1].glob("*/bank.json"))) == (end == "replace"))
    at_rest(cluster, links)


def test_what_waits_gets_the_adapter_that_there_is_by_then(started, model):
    cluster, links = started(Policy(least=1, most=1, consolidate_every=None))
    _, tenants = family()
    cluster.model.load_adapter("new", tenants["lora"])
    busy = submitted(cluster, long(cluster._dispatcher.limits.batch))
    waits = [cluster.submit((11, 12, 13), "new", max_new_tokens=8) for _ in range(2)]
    cluster.model.load_adapter("new", tenants["rslora"], replace=True)
    expected = alone(model, Asked((11, 12, 13), "rslora", 8))
    assert [handle.result(60).token_ids for handle in waits] == [expected] * 2
    assert all(handle.wait(60) for handle in busy)
    at_rest(cluster, links)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_every_request_is_answered(started, model, seed):
    """Random requests, cancels, deaths, hangs and changes of scale: each ends as it does alone, or with an error."""
    rng = random.Random(seed)
    asked = long(40, seed, tokens=25)
    expected = [alone(model, one) for one in asked]
    cluster, links = started(
        Policy(least=1, most=3, linger=0.1, look_every=0.1, consolidate_every=0.2, spare=0, ask_at=1),
        silence=1.5,
        tries=5,
    )
    handles, cancelled, stop = [], set(), threading.Event()
    calm = time.monotonic() + 8  # on a slow machine, replicas would die faster than they start, for ever

    def trouble():
        while not stop.wait(0.15 + 0.2 * rng.random()) and time.monotonic() < calm:
            if not links.serving:
                continue
            what = rng.random()
            if what < 0.3:
                rng.choice(links.serving).killed = True
            elif what < 0.4:
                rng.choice(links.serving).hangs = True
            elif what < 0.6:
                cluster._dispatcher._loop.call(cluster._dispatcher._scale, rng.randint(1, 3))

    troubled = threading.Thread(target=trouble)
    troubled.start()
    try:
        for place, one in enumerate(asked):
            handles.append(cluster.submit(one.prompt, one.adapter, max_new_tokens=one.tokens))
            if rng.random() < 0.15:
                handles[rng.randrange(len(handles))].cancel()
            time.sleep(0.04 * rng.random())
            if rng.random() < 0.1:
                cancelled.add(place)
                handles[place].cancel()
        ended = [handle.wait(60) for handle in handles]
    finally:
        stop.set()
        troubled.join()
    assert all(ended)
    answered = 0
    for handle, whole in zip(handles, expected, strict=True):
        if handle.error is not None:
            assert isinstance(handle.error, EngineError), handle.error
            continue
        completion = handle.completion()
        answered += completion.finish_reason != "cancelled"
        assert completion.token_ids == whole[: len(completion.token_ids)]
        assert completion.finish_reason == "cancelled" or completion.token_ids == whole
    assert answered > 20
    at_rest(cluster, links)
