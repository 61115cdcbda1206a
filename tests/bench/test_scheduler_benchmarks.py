"""The scheduler's benchmarks save what they say."""

import json

from lorakit.bench import scheduler_hour, simulator


def test_the_simulators_speed_is_saved(tmp_path, capsys):
    simulator.run(tmp_path, fleets={2: 5.0}, runs=1)
    found = json.loads((tmp_path / "simulator.json").read_text())["results"]
    assert found["speed"]["2 GPUs"]["requests_per_minute"]["min"] > 0 and found["near"] == {}
    assert "2 GPUs" in capsys.readouterr().out


def test_the_hour_compares_schemes_and_parameters(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scheduler_hour, "CURVES", {"linger": (0.0, 5.0), "light": (0.5,), "start": (1.0,)})
    scheduler_hour.run_hour(tmp_path, 8.0, 20.0, seeds=(0, 1))
    found = json.loads((tmp_path / "scheduler_hour.json").read_text())["results"]
    assert set(found["schemes"]) == {"seed 0", "seed 1"}
    assert (
        found["schemes"]["seed 0"]["punica"]["gpu_hours"]
        >= found["schemes"]["seed 0"]["least"]["any_schedule_gpu_hours"]
    )
    assert set(found["parameters"]["linger"]) == {"0.0", "5.0"}
    assert len(list(tmp_path.glob("scheduler_*.png"))) == 6
