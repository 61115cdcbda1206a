"""scheduler-hour: Punica's cluster experiment, simulated: scheme beside scheme, and the policy's parameters one by one.

An hour on up to 16 GPUs, Llama-2-7B's costs on an H100, a load that rises to 85 requests a second and falls, skewed
popularity, lengths as of real chats. Ray Serve's router with its autoscaler's defaults, with targets and delays that
suit the batch better, and with a fixed fleet. Three seeds for what the marks are about, one for the parameters.

Two numbers: see `lorakit.scheduler.bound` for the least GPU-hours that the hour takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.bench.harness import save, show
from lorakit.bench.plots import curves
from lorakit.scheduler.costs import SECOND, read_costs
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.report import draw, numbers, rows
from lorakit.scheduler.schemes import Autoscaler, Scheme, make_scheme
from lorakit.scheduler.simulator import Hardware, simulate
from lorakit.scheduler.snapshot import Limits
from lorakit.scheduler.summary import bounds
from lorakit.workloads import Asked, punica_hour

RATE, SECONDS, GPUS = 85.0, 3600.0, 16
_HARDWARE = Hardware(read_costs("h100-llama-2-7b"))
_PAPER = Policy(headroom=1, ask_at=1, backlog=1, linger=0.0, spare=0)
"""Punica's rules with nothing added: a lightly loaded GPU is kept, an empty one goes at once."""

_SCHEMES: Mapping[str, tuple[str, Policy, Autoscaler | None]] = {
    "punica": ("punica", Policy(), None),
    "punica-affinity": ("punica-affinity", Policy(), None),
    "punica-fair": ("punica-fair", Policy(), None),
    "punica, the paper's rules alone": ("punica", _PAPER, None),
    "punica, never consolidating": ("punica", Policy(consolidate_every=None), None),
    "punica, a GPU for each batch that waits": ("punica", Policy(backlog=1, linger=25.0), None),
    "ray-serve, its defaults": ("ray-serve", Policy(), Autoscaler()),
    "ray-serve, target 22": ("ray-serve", Policy(), Autoscaler(22.0)),
    "ray-serve, target 24, down after 60 s": ("ray-serve", Policy(), Autoscaler(24.0, down_delay=60.0)),
    "ray-serve, 16 GPUs": ("ray-serve", Policy(), None),
    "round-robin, target 22": ("round-robin", Policy(), Autoscaler(22.0)),
    "least-loaded, target 22": ("least-loaded", Policy(), Autoscaler(22.0)),
    "gpu-a-tenant": ("gpu-a-tenant", Policy(), None),
}
_PLOTTED = ("punica", "ray-serve, its defaults", "ray-serve, target 22", "gpu-a-tenant")

CURVES: Mapping[str, tuple[Any, ...]] = {
    "linger": (0.0, 5.0, 10.0, 15.0, 25.0, 40.0, 60.0),
    "ask_at": (1, 4, 16, 32),
    "backlog": (1, 2, 4, 8, 16),
    "spare": (0, 16, 32, 64, 128),
    "consolidate_every": (2.0, 5.0, 15.0, 60.0),
    "consolidate_below": (0.1, 0.25, 0.5, 1.0),
    "move_tokens": (0, 1024, 4096, 16384),
    "light": (0.25, 0.5, 0.75, 1.0),
    "start": (0.0, 10.0, 30.0, 60.0, 120.0),
}
"""Parameter → its values; the others keep their defaults. `light` with one lightly loaded GPU to keep."""


def run(folder: Path) -> None:
    """Simulates, prints and saves `scheduler_hour.json` and plots. Minutes."""
    run_hour(folder, RATE, SECONDS, seeds=(0, 1, 2))


def run_hour(folder: Path, rate: float, seconds: float, *, seeds: tuple[int, ...]) -> None:
    """The same for another load.

    Args:
        folder: where to.
        rate: the most requests a second.
        seconds: of the trace.
        seeds: of traces; the first one's are plotted, and taken for the parameters.
    """
    results: dict[str, Any] = {"schemes": {}, "parameters": {}}
    asked = punica_hour(rate, seconds, "skewed", "chat", seeds[0])
    least = bounds(asked, _HARDWARE, Limits())
    outcomes = {name: _play(asked, _scheme(*_SCHEMES[name]), seconds / 720) for name in _SCHEMES}
    results["schemes"][f"seed {seeds[0]}"] = {"least": least, **numbers(outcomes, least)}
    for path in draw(folder, {name: outcomes[name] for name in _PLOTTED}):
        path.replace(folder / f"scheduler_{path.name.replace(',', '').replace(' ', '_')}")
    columns, lines = rows(numbers(outcomes, least))
    for seed in seeds[1:]:
        other = punica_hour(rate, seconds, "skewed", "chat", seed)
        floor = bounds(other, _HARDWARE, Limits())
        found = {name: _play(other, _scheme(*_SCHEMES[name]), None) for name in _AGAIN}
        results["schemes"][f"seed {seed}"] = {"least": floor, **numbers(found, floor)}
    for name, value, found in _parameters(asked, least):
        results["parameters"].setdefault(name, {})[str(value)] = found
    curves(folder / "scheduler_parameters.png", results["parameters"], "of_clairvoyant", "first_token_p99_s")
    setting = {
        "rate": rate,
        "seconds": seconds,
        "gpus": GPUS,
        "popularity": "skewed",
        "lengths": "chat",
        "seeds": seeds,
    }
    path = save("scheduler_hour", folder, {**setting, "policy": str(Policy()), "limits": str(Limits())}, results)
    show(f"{len(asked):,} requests", columns, lines, path)


_AGAIN = (
    "punica",
    "punica, a GPU for each batch that waits",
    "ray-serve, its defaults",
    "ray-serve, target 22",
    "ray-serve, target 24, down after 60 s",
)


def _parameters(asked: list[Asked], least: Mapping[str, float]) -> Iterator[tuple[str, Any, dict[str, float]]]:
    for name, values in CURVES.items():
        for value in values:
            hardware, policy = _HARDWARE, Policy()
            if name == "start":
                hardware = replace(_HARDWARE, costs=replace(_HARDWARE.costs, start=round(value * SECOND)))
            elif name == "light":
                policy = Policy(headroom=1, light=value)
            else:
                # Moves are rare where many places have to stay free: what they cost is seen where they are not.
                spare = {} if name in ("linger", "ask_at", "backlog", "spare") else {"spare": 16}
                policy = Policy(**{**spare, name: value})
            found = numbers({name: _play(asked, make_scheme("punica", policy, Limits(), None), None, hardware)}, least)
            one = found[name]
            yield (
                name,
                value,
                {
                    "gpu_hours": one["gpu_hours"],
                    "of_clairvoyant": one["of_clairvoyant"],
                    "first_token_p99_s": one["first_token_s"]["p99"],
                    "moves": one["moves"],
                    "time_in_moves_percent": one["time_in_moves_percent"],
                    "gpus_started": one["gpus_started"],
                },
            )


def _scheme(name: str, policy: Policy, autoscaler: Autoscaler | None) -> Scheme:
    return make_scheme(name, replace(policy, most=GPUS), Limits(), autoscaler)


def _play(asked: list[Asked], scheme: Scheme, sample: float | None, hardware: Hardware = _HARDWARE) -> Any:
    return simulate(asked, scheme, hardware, sample=sample)
