"""Costs: what they sum up to, that they are what the saved measurements give, and how near simulated runs come."""

import itertools
import json
from pathlib import Path

import pytest

from lorakit.bench.simulator import compare
from lorakit.errors import ConfigError
from lorakit.scheduler import fitting
from lorakit.scheduler.bound import clairvoyant_gpu_time, least_gpu_time
from lorakit.scheduler.costs import MEASURED, Costs, read_costs
from lorakit.scheduler.snapshot import Limits
from lorakit.workloads import Asked

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BY_HAND = Costs(step=100, row=10, context=1, lora=5, rank=2, prompts=50, prompt=3, load=7)


def test_a_forward_by_hand():
    assert BY_HAND.forward(0, 0, 0) == 100
    assert BY_HAND.forward(2, 30, 0) == 100 + 20 + 30
    assert BY_HAND.forward(2, 30, 16 + 8, 7) == 100 + 20 + 30 + 5 + 48 + 50 + 21


def test_the_fits_are_those_of_the_saved_measurements():
    fits = fitting.fit(BENCHMARKS)
    assert {path.stem for path in MEASURED.glob("*.json")} == set(fits)
    for name, content in fits.items():
        saved = json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))
        assert saved.keys() == content.keys()
        assert saved["picoseconds"] == pytest.approx(content["picoseconds"], rel=1e-6), (
            "measured anew? python -m lorakit.scheduler.fitting benchmarks lorakit/scheduler/measured"
        )
        assert min(saved["picoseconds"].values()) > 0
        assert read_costs(name).step == saved["picoseconds"]["step"]


def test_a_fit_finds_the_costs_of_forwards_and_none_below_zero():
    mixes = list(itertools.product((0, 1, 4), (10, 90), (0, 16, 32), (0, 5, 20)))
    timed = [fitting.Timed(*mix, BY_HAND.forward(*mix)) for mix in mixes]
    found = fitting.fit_forwards(timed)
    assert found == pytest.approx({name: getattr(BY_HAND, name) for name in found})
    cheaper = [one._replace(ms=one.ms - 2 * one.rows * BY_HAND.row) for one in timed]
    assert fitting.fit_forwards(cheaper)["row"] == 0 < min(fitting.fit_forwards(timed).values())
    alone = fitting.fit_forwards([one for one in timed if not one.prompt])
    assert alone["prompts"] == alone["prompt"] == 0 and alone["step"] == pytest.approx(BY_HAND.step)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("engine_step", "h100-llama-2-7b"),
        ("engine_step_8b", "h100-llama-3-8b"),
        ("engine_step_13b", "h100-llama-2-13b"),
    ],
)
def test_decode_steps_are_as_measured(file, name):
    costs = read_costs(name)
    found = json.loads((BENCHMARKS / f"{file}.json").read_text(encoding="utf-8"))
    middle = found["setting"]["prompt"] + (found["setting"]["short"] + found["setting"]["long"]) // 2
    for mix, adapters in (("no adapters", 0), ("one adapter", 1), ("distinct adapters", 32)):
        measured = found["results"][f"lorakit, {mix}, batch 32, liger"]["step_ms"]["median"]
        assert costs.forward(32, 32 * middle, 16 * adapters) / 1e9 == pytest.approx(measured, rel=0.015)


@pytest.mark.slow
def test_whole_runs_come_near_the_measured_ones():
    """The fit has not seen these; of them it is told times between tokens, but no throughput and no mixture."""
    near = compare(BENCHMARKS / "engine_workloads.json")
    assert len(near) >= 6
    for cell, found in near.items():
        measured, simulated = found["measured"], found["simulated"]
        assert simulated["adapters_a_forward"] == pytest.approx(measured["adapters_a_forward"], rel=0.005), cell
        assert simulated["tokens_per_s"] == pytest.approx(measured["tokens_per_s"], rel=0.07), cell
        assert simulated["between_tokens_p50_ms"] == pytest.approx(measured["between_tokens_p50_ms"], rel=0.03), cell
        assert simulated["first_token_p99_s"] == pytest.approx(measured["first_token_p99_s"], rel=0.1), cell
    assert compare(BENCHMARKS / "missing.json") == {}


def test_bounds_by_hand():
    limits, trace = Limits(4, 100, 16), [Asked(0.0, 0, 20, 3)]
    shared = 100 + 5 + 2 * 4
    own = 2 * 10 + 20 + 20 + 3 + 20 * 3  # two decoded rows, their contexts, the prompt's tokens
    assert least_gpu_time(trace, BY_HAND, limits, (4,)) == (3 * shared + 50) // 4 + own
    alone = 3 * shared + 4 * (own + 50)
    assert clairvoyant_gpu_time(trace, BY_HAND, limits, (4,)) == alone
    assert clairvoyant_gpu_time(trace * 4, BY_HAND, limits, (4,)) == alone
    assert clairvoyant_gpu_time(trace * 5, BY_HAND, limits, (4,)) == 2 * alone


def test_costs_of_another_file_and_of_none(tmp_path):
    fields = dict.fromkeys(("step", "row", "context", "lora", "rank", "prompts", "prompt", "load"), 1)
    (tmp_path / "mine.json").write_text(json.dumps({"picoseconds": fields, "limits": {"start": 5}}))
    assert read_costs(str(tmp_path / "mine.json")).start == 5
    for content in ("[]", "{", '{"picoseconds": {"step": 1}}', json.dumps({"picoseconds": {**fields, "step": -1}})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=r"bad\.json does not hold costs"):
            read_costs(str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match="no costs 'h100': there are h100-llama-2-13b, h100-llama-2-7b"):
        read_costs("h100")
