"""`lorakit simulate`: a report that says what was simulated, and refusals before anything is played."""

import json
import sys

import pytest

from lorakit import cli
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.schemes import SCHEMES
from lorakit.scheduler.settings import make_policy


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run_(*args):
        monkeypatch.setattr(sys, "argv", ["lorakit", "simulate", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, " ".join(f"{printed.out} {printed.err}".split())

    return run_


def test_a_report_of_all_schemes_and_the_same_from_the_written_trace(run, tmp_path):
    code, shown = run("--minutes", 0.3, "--rate", 12, "--gpus", 3, "--start", 1, "--write", "trace.jsonl")
    assert code == 0 and all(name in shown for name in SCHEMES)
    found = json.loads((tmp_path / "simulation/report.json").read_text())
    assert set(found["results"]) == set(SCHEMES)
    assert found["setting"]["requests"] == len((tmp_path / "trace.jsonl").read_text().splitlines())
    for one in found["results"].values():
        assert one["gpu_hours"] > found["least"]["any_schedule_gpu_hours"] > 0
        assert one["of_any_schedule"] == pytest.approx(one["gpu_hours"] / found["least"]["any_schedule_gpu_hours"])
        assert one["first_token_s"]["p99"] >= one["first_token_s"]["p50"] > 0
    page = (tmp_path / "simulation/report.md").read_text()
    pictures = {path.name for path in (tmp_path / "simulation").glob("*.png")}
    assert len(pictures) == 1 + len(SCHEMES) and all(f"]({name})" in page for name in pictures)
    code, _ = run("trace.jsonl", "--gpus", 3, "--start", 1, "-s", "punica", "--out", "again")
    assert code == 0
    again = json.loads((tmp_path / "again/report.json").read_text())["results"]
    assert again == {"punica": found["results"]["punica"]}


def test_settings_reach_the_policy():
    items = ["linger=3", "affinity=true", "consolidate_every=none", "rank_budget=64", "light=0.5", "ask_at=2"]
    expected = Policy(
        linger=3.0, affinity=True, consolidate_every=None, rank_budget=64, light=0.5, ask_at=2, most=7
    )  # fmt: skip
    assert make_policy(items, most=7) == expected


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-s", "best"], "there is no scheme 'best'; there are punica"),
        (["--set", "lingre=3"], "the policy has no field 'lingre'; it has light"),
        (["--set", "linger=long"], "linger is 'long'; give a number"),
        (["--set", "affinity=yes"], "affinity is 'yes'; give true or false"),
        (["--set", "rank_budget=few"], "give a whole number or none"),
        (["--costs", "b200"], "no costs 'b200'"),
        (["--popularity", "zipf"], "no popularity 'zipf'"),
        (["--lengths", "long"], "no lengths 'long'; there are punica, chat, slora"),
        (["--minutes", "0.01", "--rate", "0.001"], "no request came"),
        (["--minutes", "inf"], "finite"),
        (["--adapters", "8"], "room for 8 adapters, and a batch may have 32"),
        (["missing.jsonl"], "the trace missing.jsonl cannot be read"),
        (["--target", "-1"], "target has to be above 0"),
    ],
)
def test_mistakes_are_refused(run, args, words, tmp_path):
    code, said = run("--minutes", 0.1, *args)
    assert code == 2 and words in said
    assert not (tmp_path / "simulation").exists()
