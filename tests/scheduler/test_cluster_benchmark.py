"""The benchmark of a cluster: it measures what it says, on replicas in this process."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from in_process import InProcess
from tiny import TINY

from lorakit import Engine, MultiLoraModel
from lorakit.bench import cluster as benchmark
from lorakit.bench import engine_costs, open_loop
from lorakit.bench.cluster import Setting
from lorakit.bench.open_loop import Run, Served
from lorakit.bench.random_bank import RandomBank
from lorakit.engine.config import EngineConfig
from lorakit.errors import BaseModelMismatchError, EngineBusyError
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.costs import Costs
from lorakit.scheduler.sample import Sample

SETTING = Setting(
    replicas=2, batch=3, tokens=64, seconds=3.0, shorter=128, linger=0.3, consolidate_every=0.2, adapters=6, rounds=1
)
# Slow enough that few requests come, wherever this runs.
COSTS = Costs(step=20 * 10**9, row=10**8, context=10**6, lora=10**8, rank=10**6, prompts=10**8, prompt=10**7, load=0)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "bank"
    torch.manual_seed(0)
    base = TINY.build(torch.device("cpu"))
    return RandomBank(base, SETTING.adapters, rank=2, dtype=torch.float32, contents=6).on_disk(folder)


@pytest.fixture
def started(bank):
    def model():
        torch.manual_seed(0)
        return MultiLoraModel(TINY.build(torch.device("cpu")))

    def make(setting=SETTING):
        catalog = Catalog(bank, "base")
        config = EngineConfig(max_requests=3, page_size=16, prefix_cache=False, cache_memory=1 << 20)
        return benchmark.cluster_of(InProcess(model, catalog, config), catalog, TINY, setting)

    return make


@pytest.fixture
def cluster(started):
    with started() as cluster:
        yield cluster


def test_a_trace_is_served_and_simulated(cluster, bank, tmp_path, capsys):
    results = benchmark.compare(cluster, bank.names, TINY, SETTING, COSTS)
    assert results["requests"] > 10
    for kind in (benchmark.REAL, benchmark.SIMULATED, benchmark.SLOWED):
        found, series = results[kind], results["series"][kind]
        assert found["answered"] == found["requests"] == results["requests"] and 1 <= found["most_gpus"] <= 2
        assert found["gpu_hours"] * 3600 >= found["seconds"] * 0.99
        assert len(series["seconds"]) == len(series["replicas"]) == len(series["working_sets"]["0"])
        assert set(series["working_sets"]) <= {"0", "1"} and max(series["replicas"]) <= 2
    assert results["real"]["errors"] == 0 and results["real"]["error_texts"] == []
    values = results["series"]["requested_per_s"]
    assert sum(values["values"]) * values["every_s"] == pytest.approx(results["requests"])
    benchmark.report(tmp_path, TINY, SETTING, results)
    cells = json.loads((tmp_path / "cluster.json").read_text())["cells"]
    (name,) = cells
    assert name.startswith("2 x ") and cells[name]["results"] == json.loads(json.dumps(results))
    assert len(list(tmp_path.glob("cluster_2_x_*.png"))) == 1
    assert "real" in capsys.readouterr().out


def test_every_request_is_told_of(cluster, bank):
    asked = benchmark.make_trace(SETTING._replace(seconds=0.5), 20.0, 6)
    run = open_loop.serve(cluster, asked, bank.names, TINY.vocabulary)
    for one, served in zip(asked, run.served, strict=True):
        assert served.error is None and served.arrival == one.arrival and served.late >= 0
        assert len(served.times) == one.new_tokens and served.times[0] >= one.arrival
        assert served.moves + served.evictions or 0 < served.begun_in <= served.times[0] - one.arrival
        assert len(served.replicas) == 1 + served.moves + served.evictions
    # Refused, and told so.
    cluster._tenants.change("all", ClusterConfig().default_tenant.__class__(max_waiting=1))
    run = open_loop.serve(cluster, [one for one in asked for _ in range(20)], bank.names, TINY.vocabulary)
    found = open_loop.summary(run)
    assert found["errors"] + found["answered"] == 20 * len(asked) and found["errors"]
    assert all(text.startswith(EngineBusyError.__name__) for text in found["error_texts"])


def test_an_engines_forwards_are_measured(bank):
    model = benchmark.make_replica(TINY, SETTING, dict(bank.fingerprint)).model.model
    with Engine(MultiLoraModel(model, bank), EngineConfig(max_requests=3, cache_memory=1 << 20)) as engine:
        measured = engine_costs.measure(engine, 3, bank.names, TINY.rank, TINY.vocabulary, 16, 1)
    assert {one.rows for one in measured.forwards} == {0, 1, 3} and len(measured.load_ms) == 5
    assert {one.ranks for one in measured.forwards} == {0, 2, 6}
    costs = engine_costs.costs_of([measured, measured])
    assert costs.forward(3, 30, 6) > 10**8  # more than a tenth of a millisecond
    with pytest.raises(BaseModelMismatchError):
        benchmark.make_replica(TINY._replace(shape={**TINY.shape, "hidden_size": 64}), SETTING, dict(bank.fingerprint))


def test_replicas_are_measured_at_the_same_time(started, bank):
    one = SETTING._replace(replicas=1)
    costs = benchmark.measure([partial(started, one)] * 2, bank.names, TINY, SETTING)
    assert costs.forward(1, 10, 2) > 10**8 and costs.start == Costs.start
    slower = costs.times(2.0)
    assert slower.forward(2, 10, 2, 5) == pytest.approx(2 * costs.forward(2, 10, 2, 5), rel=1e-6)
    assert slower.load == costs.load and slower.start == costs.start


def test_replicas_are_numbered_as_gpus_are():
    raw = [
        Sample(0.0, 1, 0, {32: 5}),
        Sample(1.0, 2, 3, {32: 8}),
        Sample(2.0, 2, 0, {32: 8, 31: 2}),
        Sample(3.0, 3, 0, {31: 4, 30: 1}),  # the first has gone, another came, a third starts
        Sample(4.0, 2, 0, {31: 4, 30: 1}),
    ]
    found = [sample.working_sets for sample in open_loop.numbered(raw)]
    assert found == [{0: 5}, {0: 8, 1: 0}, {0: 8, 1: 2}, {1: 4, 0: 1, 2: 0}, {1: 4, 0: 1}]
    assert open_loop.starts(raw) == [1.0]
    assert open_loop.starts(
        [Sample(0.0, 1, 0, {1: 0}), Sample(1.0, 3, 0, {1: 0}), Sample(4.5, 2, 0, {1: 0, 2: 0})]
    ) == [3.5]


def test_a_runs_gpu_hours_and_latencies():
    samples = [Sample(0.1 * place, 1 if place < 10 else 2, 0, {0: 1}) for place in range(1, 20)]
    served = [
        Served(0.0, 0.0, 0.4, (0.5, 0.6, 0.8), (0,), 0, 0, None),
        Served(0.2, 0.0, None, (), (0, 1), 1, 0, "EngineError: lost"),
    ]
    run = Run(served, samples, 2.0)
    assert open_loop.gpu_seconds(run) == pytest.approx(1.0 + 2.0)
    found = open_loop.summary(run)
    assert (found["answered"], found["errors"], found["moves"], found["on_several_replicas"]) == (1, 1, 1, 1)
    assert found["first_token_s"]["p50"] == 0.5 and found["gpus_started"] == 1
    assert found["begun_in_ms"]["p50"] == 400
    assert found["between_tokens_ms"]["p50"] == pytest.approx(150)
    thinned = open_loop.thinned(samples, 0.5)
    assert all(0.4 < later.seconds - before.seconds < 0.6 for before, later in pairwise(thinned)) and len(thinned) == 4
