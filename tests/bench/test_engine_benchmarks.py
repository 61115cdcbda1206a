"""The engine's benchmarks, on the CPU and a tiny base: what they measure is what they say."""

import pytest
from tiny import CPU, TINY, last

from lorakit.bench import BENCHMARKS, engine_step, engine_workloads
from lorakit.bench.engine_step import Steps
from lorakit.bench.engine_workloads import Workload


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name.startswith("engine-")])
def test_without_a_gpu_nothing_is_measured(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    BENCHMARKS[name](tmp_path)
    assert capsys.readouterr().out == f"{name}: left out, it measures a GPU\n"
    assert not list(tmp_path.iterdir())


def test_steps(tmp_path):
    steps = Steps(batches=(1, 2), prompt=5, short=2, long=6, variants=("plain",), runs=2)
    results = last(engine_step.measure(TINY, steps, CPU))
    assert list(results) == [
        f"{what}, batch {batch}, plain"
        for batch in (1, 2)
        for what in ("transformers, no adapters", "lorakit, no adapters", "lorakit, one adapter",
                     "lorakit, distinct adapters")[: 3 if batch == 1 else 4]
    ]  # fmt: skip
    assert all(found["step_ms"]["runs"] == 2 for found in results.values())
    engine_step.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_workloads():
    workload = Workload(requests=6, batch=3, contents=2, tokens=2048, longest=8, liger=False)
    found = dict(engine_workloads.measure(TINY, workload._replace(popularities=("distinct", "identical")), CPU))
    assert list(found) == ["distinct, batch 3, plain", "identical, batch 3, plain"]
    distinct, identical = found.values()
    assert (distinct["adapters_asked_for"], identical["adapters_asked_for"]) == (6, 1)
    assert identical["mean_adapters_of_a_forward"] == 1 < distinct["mean_adapters_of_a_forward"] <= 3
