"""A cluster on Ray's own processes: what it gives, and that it survives what processes do."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from clusters import ADAPTERS, long, spread, submitted, wait_until
from served import SMALL, Asked, alone, double, family, requests

import lorakit
from lorakit import MultiLoraModel
from lorakit.errors import EngineBusyError, EngineError

ray = pytest.importorskip("ray")
# ruff: noqa: E402 - what follows needs Ray

from tiny_engines import make, make_picky, make_shared, text

from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.ray_cluster import RayLinks, RaySettings

# One worker has all of them, and one Ray.
pytestmark = [pytest.mark.slow, pytest.mark.early, pytest.mark.xdist_group("ray")]

TWO = Policy(least=2, most=2, consolidate_every=None)
HERE = Path(__file__).parent
ONE_EACH = RaySettings(gpus=0, cpus=1.0)


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """A Ray cluster of this machine, whose processes find the tests' modules."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    before = os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    # GPUs in name alone: Ray counts them, and nobody looks for them. Other tests use the machine at the same time, so
    # Ray's processes shall not be the last to get it.
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
        _system_config={"worker_niceness": 0},
    )
    yield
    ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    base, tenants = family()
    return lorakit.export(tenants, tmp_path_factory.mktemp("ray") / "bank", base_model=base)


@pytest.fixture(scope="module")
def model(bank):
    return MultiLoraModel(double(), bank)


def cluster_of(bank, made=make, settings=ONE_EACH, policy=TWO, **changes):
    catalog = Catalog(bank, family()[0])
    base = double()
    config = ClusterConfig(**{"silence": 4.0, "beat": 0.5, "start_timeout": 300.0, **changes})
    links = RayLinks(made, catalog.folders, settings)
    return Cluster(links, catalog, base.config, policy, config, generation_config=base.generation_config, decode=text)


@pytest.fixture(scope="module")
def shared(bank):
    """The cluster of most tests: what they kill begins anew."""
    with cluster_of(bank) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared):
    wait_until(lambda: shared.stats().replicas == 2, 180)  # others may use the machine's cores
    yield shared
    wait_until(lambda: not shared.stats().open and not shared._dispatcher._flights)
    wait_until(lambda: not shared._tenants.waiting and not shared._tenants._running)


def processes(name):
    """Ray's processes of an actor's name."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(name):
                found.append(process)
        except psutil.Error:
            continue
    return found


def busy(cluster):
    """The engines' processes; those that run sequences take the most time."""
    return processes("ray::EngineActor")


def check(handles, expected):
    assert [handle.result(90).token_ids for handle in handles] == expected
    assert [tuple(token.id for token in handle) for handle in handles] == expected, "a token came twice, or never"


def test_two_replicas_give_what_a_request_gives_alone(cluster, model):
    asked = requests(30, ADAPTERS, longest=20)
    expected = [alone(model, one) for one in asked]
    check(submitted(cluster, asked), expected)
    sampled = {"temperature": 1.0, "seed": 3, "n": 3, "ignore_eos": True, "max_new_tokens": 12}
    with lorakit.Engine(model, SMALL, decode=text) as engine:
        one = engine.submit([11, 12, 13], "lora", **sampled).results(30)
        assert [each.token_ids for each in cluster.submit([11, 12, 13], "lora", **sampled).results(30)] == [
            each.token_ids for each in one
        ]


def test_streams_survive_a_move(cluster, model):
    asked = long(6)
    expected = [alone(model, one) for one in asked]
    handles = submitted(cluster, asked)
    for _ in range(20):
        cluster._dispatcher._loop.call(spread, cluster, handles)
        time.sleep(0.02)
    check(handles, expected)
    assert sum(handle.parts[0].moves for handle in handles) >= 2


def test_an_adapter_comes_through_the_object_store(cluster, model):
    cluster.model.load_adapter("new", family()[1]["lora"])
    expected = alone(model, Asked((11, 12, 13), "lora", 8))
    handles = [cluster.submit((11, 12, 13), "new", max_new_tokens=8) for _ in range(12)]
    assert {handle.result(30).token_ids for handle in handles} == {expected}
    cluster.model.unload_adapter("new")


@pytest.mark.parametrize("name", ["ray::EngineActor", "ray::ServeReplica"])
def test_a_replica_is_killed_in_the_middle_of_streams(cluster, model, name):
    asked = long(10)
    expected = [alone(model, one) for one in asked]
    handles = submitted(cluster, asked)
    cluster._dispatcher._loop.call(spread, cluster, handles)
    for handle in handles[:4]:
        next(iter(handle))
    random.Random(0).choice(processes(name)).kill()
    check(handles, expected)


def test_a_replica_that_hangs_is_given_up(cluster, model):
    asked = long(10)
    expected = [alone(model, one) for one in asked]
    handles = submitted(cluster, asked)
    for handle in handles[:4]:
        next(iter(handle))
    hung = processes("ray::EngineActor")[0]
    hung.suspend()
    try:
        check(handles, expected)
        wait_until(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE)
    finally:
        if hung.is_running():
            hung.kill()


def test_another_server_is_refused_while_one_uses_the_replicas(cluster, bank):
    with pytest.raises(EngineBusyError, match="another server"):
        cluster_of(bank).start()
    assert len(cluster.submit([11, 12, 13], max_new_tokens=3).result(30).token_ids) == 3


def test_replicas_end_under_load_and_come_again(cluster, model):
    asked = long(10)
    expected = [alone(model, one) for one in asked]
    handles = submitted(cluster, asked)
    cluster._dispatcher._loop.call(spread, cluster, handles)

    def shrink():
        cluster._dispatcher.policy = Policy(least=1, most=2, linger=600.0, consolidate_every=None, ask_at=100)
        cluster._dispatcher._scale(1)

    cluster._dispatcher._loop.call(shrink)
    check(handles, expected)
    wait_until(lambda: cluster.stats().replicas == 1)
    wait_until(lambda: len(processes("ray::EngineActor")) == 1, 60)
    cluster._dispatcher.policy = TWO
    cluster._dispatcher._loop.call(cluster._dispatcher._scale, 2)


def test_an_adapter_that_loads_on_one_replica_only(bank, model, tmp_path):
    expected = alone(model, Asked((11, 12, 13), "lora", 6))
    with cluster_of(bank, partial(make_picky, str(tmp_path))) as cluster:
        wait_until(lambda: cluster.stats().replicas == 2, 180)
        handles = [cluster.submit((11, 12, 13), "lora", max_new_tokens=6) for _ in range(6)]
        assert {handle.result(30).token_ids for handle in handles} == {expected}


def test_a_replica_of_several_processes(bank, model, tmp_path):
    family()[0].save_pretrained(tmp_path)
    asked = requests(12, ADAPTERS, longest=20)
    expected = [alone(model, one) for one in asked]
    settings, one = RaySettings(gpus=2, cpus=2.0), Policy(least=1, most=1)
    with cluster_of(bank, partial(make_shared, str(tmp_path)), settings, one) as cluster:
        assert len(processes("ray::EngineActor")) >= 2
        cluster.model.pin_adapter("rslora")
        wait_until(lambda: cluster.stats().device.adapters == 1, 20)
        check(submitted(cluster, asked), expected)
        there = cluster.stats().device.adapters
        cluster.model.unload_adapter("dora")
        wait_until(lambda: cluster.stats().device.adapters == there - 1, 20)
        cluster.model.unpin_adapter("rslora")
        rest = [place for place, one in enumerate(asked) if one.adapter != "dora"]
        check(submitted(cluster, [asked[place] for place in rest]), [expected[place] for place in rest])


def test_a_replica_that_cannot_begin_says_why(bank, tmp_path):
    with pytest.raises(EngineError, match="no replica could begin"):
        cluster_of(bank, partial(make_picky, str(tmp_path / "nothing here"))).start()


@contextmanager
def fronted(bank, away=0.0):
    """A server in a process of its own, which streams, and then is away for so many seconds."""
    address = ray.get_runtime_context().gcs_address
    front = subprocess.Popen(
        [sys.executable, str(HERE / "front.py"), address, str(bank.path), str(away)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert front.stdout is not None and front.stdout.readline().strip() == "streaming"
        yield front
    finally:
        front.kill()
        front.wait(10)


FRONTED = RaySettings(gpus=0, cpus=1.0, lease=2.0)


def engines():
    return {process.pid for process in processes("ray::EngineActor")}


def test_the_router_is_killed_and_another_takes_over(bank, model, tmp_path):
    """The server's process dies: its replicas drop what it asked, and serve the next one."""
    with fronted(bank) as front:
        before = engines()
        front.send_signal(signal.SIGKILL)
        front.wait(10)
        time.sleep(2 * FRONTED.lease)
        asked = long(8)
        expected = [alone(model, one) for one in asked]
        with cluster_of(bank, settings=FRONTED, policy=Policy(least=1, most=1), silence=15.0) as cluster:
            check(submitted(cluster, asked), expected)
            stats = cluster.stats()
            assert stats.replicas == 1
            wait_until(lambda: [one.stats.open for one in cluster._dispatcher.replicas] == [0])
            assert engines() <= before, "the replicas were begun anew"


def test_a_server_that_was_away_while_another_took_over_touches_nothing(bank, model):
    asked = long(8)
    expected = [alone(model, one) for one in asked]
    with fronted(bank, away=15.0) as front:
        time.sleep(2 * FRONTED.lease)
        with cluster_of(bank, settings=FRONTED, policy=Policy(least=1, most=1), silence=15.0) as cluster:
            before = engines()
            handles = submitted(cluster, asked)
            assert front.stdout.readline().strip() == "SupersededError"
            assert front.stdout.readline().strip() == "closed"
            check(handles, expected)
            check(submitted(cluster, asked), expected)
            assert engines() == before and not any(handle.parts[0].deaths for handle in handles)


@pytest.mark.parametrize("seed", range(3))
def test_requests_in_are_answers_and_clear_errors(cluster, model, seed):
    """Random requests, cancels and deaths: each ends as it does alone, is cancelled, or fails by what happened."""
    rng = random.Random(seed)
    asked = long(30, seed, tokens=30)
    expected = [alone(model, one) for one in asked]
    handles, trouble = [], rng.randrange(5, 20)
    for place, one in enumerate(asked):
        handles.append(cluster.submit(one.prompt, one.adapter, max_new_tokens=one.tokens, deadline=60.0))
        time.sleep(0.03 * rng.random())
        if rng.random() < 0.15:
            handles[rng.randrange(len(handles))].cancel()
        if place == trouble:
            rng.choice(processes(rng.choice(["ray::EngineActor", "ray::ServeReplica"]))).kill()
    assert all(handle.wait(90) for handle in handles)
    answers = cancelled = errors = 0
    for handle, whole in zip(handles, expected, strict=True):
        if handle.error is not None:
            assert isinstance(handle.error, lorakit.errors.LorakitError), handle.error
            errors += 1
            continue
        completion = handle.completion()
        if completion.finish_reason == "cancelled":
            assert completion.token_ids == whole[: len(completion.token_ids)]
            cancelled += 1
        else:
            assert completion.token_ids == whole
            answers += 1
    assert answers + cancelled + errors == len(asked) and errors == 0 and answers >= 20
