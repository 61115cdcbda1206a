"""The engine's benchmarks, on the CPU and a tiny base: what they measure is what they say."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CPU, TINY, last

from lorakit.bench import (
    BENCHMARKS,
    engine_adapters,
    engine_loading,
    engine_peft,
    engine_step,
    engine_tensor_parallel,
    engine_workloads,
)
from lorakit.bench.engine_step import Steps
from lorakit.bench.engine_workloads import Workload
from lorakit.bench.llamas import LINEARS


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
                     "lorakit, distinct adapters", "lorakit, distinct adapters, top-p 0.9")[: 3 if batch == 1 else 5]
    ]  # fmt: skip
    assert all(found["step_ms"]["runs"] == 2 for found in results.values())
    engine_step.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


@pytest.mark.long
@pytest.mark.xdist_group("processes")
def test_a_base_shared_by_processes(tmp_path):
    steps = Steps(prompt=5, short=2, long=6, runs=1)
    shared = engine_tensor_parallel.Shared(TINY, rows=3, steps=steps, cuda=False)
    engine_tensor_parallel.run_shared(tmp_path, shared, 2)
    cell = json.loads((tmp_path / "engine_tensor_parallel.json").read_text())["cells"]["2 x cpu"]
    assert {"no adapters", "one adapter", "distinct adapters"} < set(cell["results"])
    # Two layers of rank 2 in float32: q, o, k, v, gate, up and down. A process has a part of A or of B, and the other.
    whole = 3 * 2 * 4 * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert whole / 2 < cell["results"]["adapter_bytes_of_a_process"] < whole


def test_workloads():
    workload = Workload(requests=6, batch=3, contents=2, tokens=2048, longest=8, liger=False)
    found = dict(engine_workloads.measure(TINY, workload._replace(popularities=("distinct", "identical")), CPU))
    assert list(found) == ["distinct, batch 3, plain, cpu", "identical, batch 3, plain, cpu"]
    distinct, identical = found.values()
    assert (distinct["adapters_asked_for"], identical["adapters_asked_for"]) == (6, 1)
    assert identical["mean_adapters_of_a_forward"] == 1 < distinct["mean_adapters_of_a_forward"] <= 3


def test_adapters(tmp_path):
    workload = engine_adapters.Workload(
        counts=(2, 12),
        requests=8,
        longest=6,
        batch=4,
        rounds=2,
        contents=3,
        adapter_memory=60_000,
        rate=200.0,
        liger=False,
    )
    assert [(one.arrival, one.prompt_tokens, one.new_tokens) for one in engine_adapters._asked(workload, 2, 0)] == [
        (one.arrival, one.prompt_tokens, one.new_tokens) for one in engine_adapters._asked(workload, 12, 1)
    ]
    engine_adapters.run_workload(tmp_path, TINY, workload, CPU)
    results = json.loads((tmp_path / "engine_adapters.json").read_text())["results"]
    few, many = results["2 adapters"], results["12 adapters"]
    fits = many["fit_on_the_device"]
    assert few["fit_on_the_device"] == 2 < fits < 12
    assert few["adapters_asked_for"]["max"] <= 2 < many["adapters_asked_for"]["min"]
    assert few["loads"]["max"] <= 2 < many["loads"]["median"]
    # There is no room from the beginning.
    assert many["loads"] == many["evictions"]
    assert many["requests_per_s_of_the_fewest"]["runs"] == 2
    assert many["requests_per_s"]["median"] > 0 and few["requests_per_s_of_the_fewest"]["median"] == 1
    assert (tmp_path / "engine_adapters.png").stat().st_size


def test_loading(tmp_path):
    setting = engine_loading.Setting(rows=3, prompt=6, tokens=40, coming=4, room=2, rounds=1, liger=False)
    engine_loading.run_setting(tmp_path, TINY, setting, CPU)
    results = json.loads((tmp_path / "engine_loading.json").read_text())["results"]
    assert list(results) == list(engine_loading.PHASES)
    for name, found in results.items():
        assert 0 < found["between_tokens_ms"]["p50"]["median"] <= found["between_tokens_ms"]["p99"]["median"]
        assert (found["loads_per_s"]["median"] == 0) == (name == engine_loading.ALONE), name
    assert results[engine_loading.ALONE]["p50_of_no_loads"]["median"] == 1


def test_a_load_that_fails_is_told():
    loader = engine_loading._Loader(None, ["gone"], engine_loading.Phase())
    loader.start()
    with pytest.raises(AttributeError, match="load_adapter"):
        loader.stop()


def test_peft(tmp_path):
    setting = engine_peft.Setting(
        adapters=3, prompt=6, short=2, long=6, peft_short=1, peft_long=3, switched=2, answer=3, runs=1, liger=False
    )
    engine_peft.run_setting(tmp_path, TINY, setting, CPU)
    results = json.loads((tmp_path / "engine_peft.json").read_text())["results"]
    assert set(results) == {engine_peft.ENGINE, engine_peft.MIXED, engine_peft.SWITCHED}
    engine = results[engine_peft.ENGINE]["tokens_per_s"]["median"]
    for found in results.values():
        assert found["engine_is_times_faster"]["median"] == engine / found["tokens_per_s"]["median"]
    assert results[engine_peft.SWITCHED]["whole_requests_tokens_per_s"]["median"] > 0


def test_pefts_model_is_as_peft_makes_it():
    names = ["first", "second", "third"]
    fast = engine_peft.with_adapters(TINY.build(CPU), names, 2)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(LINEARS), init_lora_weights=False, task_type="CAUSAL_LM")
    slow = get_peft_model(TINY.build(CPU), config, adapter_name=names[0])
    for name in names[1:]:
        slow.add_adapter(name, config)
    slow.load_state_dict(fast.state_dict())  # strict
    ids = torch.tensor([[1, 2, 3]] * 4)
    with torch.no_grad():
        both = [model.eval()(ids, adapter_names=[*names, "__base__"]).logits for model in (fast, slow)]
    assert torch.equal(*both)
    assert len({tuple(row.flatten().tolist()) for row in both[0]}) == 4, "all of them act"
