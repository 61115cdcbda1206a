"""simulator: how fast the scheduler's simulator is, and how near it comes to measured runs. One core.

Speed: a load that rises and falls, on fleets of 16, 64 and 1,000 GPUs under Punica's policy, with Llama-2-7B's costs on
an H100. The load grows with the fleet.

Nearness: the runs of engine-workloads again, request by request, on one simulated replica. What the costs were fitted
to is said in `lorakit.scheduler.fitting`: none of it is a throughput, a time to first token or the number of adapters
in a forward.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.bench.harness import save, show, statistics_of
from lorakit.scheduler.costs import read_costs
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.schemes import Punica
from lorakit.scheduler.simulator import Hardware, simulate
from lorakit.scheduler.snapshot import Limits
from lorakit.scheduler.summary import gap_quantiles, summary
from lorakit.workloads import adapters_of, punica_hour, punica_lengths, trace

RATE = 85 / 16
"""Requests a second and GPU when the load is highest."""

COSTS = {"NVIDIA H100 80GB HBM3": "h100-llama-2-7b", "NVIDIA H200": "h200-llama-2-7b"}
"""GPU → the fit for Llama-2-7B on it."""


def run(folder: Path, *, fleets: Mapping[int, float] | None = None, runs: int = 3) -> None:
    """Measures, prints and saves `simulator.json`.

    Args:
        folder: where to; `engine_workloads.json` is read there, if it is there.
        fleets: GPUs → seconds of the trace.
        runs: of each fleet.
    """
    speed = {f"{gpus} GPUs": measure(gpus, seconds, runs) for gpus, seconds in (fleets or _FLEETS).items()}
    near = compare(folder / "engine_workloads.json")
    path = save("simulator", folder, {"fleets": fleets or _FLEETS, "runs": runs}, {"speed": speed, "near": near})
    rows = [
        [name, f"{one['requests']:,}", *(f"{one['requests_per_minute'][key]:,.0f}" for key in ("min", "median", "max"))]
        for name, one in speed.items()
    ]
    show("Requests simulated in a minute", ["", "requests", "min", "median", "max"], rows, path)
    lines = [
        [name, *(f"{one[what][key]:.4g}" for key in _NEAR for what in ("measured", "simulated"))]
        for name, one in near.items()
    ]
    titles = [f"{key} {what}" for key in _NEAR for what in ("measured", "simulated")]
    show("One replica", ["", *titles], lines, path)


_FLEETS = {16: 3600.0, 64: 900.0, 1000: 60.0}
_NEAR = ("tokens_per_s", "adapters_a_forward", "between_tokens_p50_ms", "first_token_p50_s")


def measure(gpus: int, seconds: float, runs: int) -> dict[str, Any]:
    """Plays a trace several times.

    Returns:
        How long it is, and how many of its requests are simulated in a minute.
    """
    asked = punica_hour(RATE * gpus, seconds, "skewed", "chat", 0)
    rates = []
    for _ in range(runs):
        scheme = Punica(Policy(most=gpus), Limits())
        began = time.perf_counter()
        simulate(asked, scheme, Hardware(read_costs("h100-llama-2-7b")))
        rates.append(60 * len(asked) / (time.perf_counter() - began))
    return {"requests": len(asked), "trace_s": seconds, "requests_per_minute": statistics_of(rates)}


def compare(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Plays the runs of engine-workloads again.

    Args:
        path: of its results; without them there is nothing to compare.

    Returns:
        Cell → what was measured and what is simulated.
    """
    if not path.exists():
        return {}
    found = {}
    for name, cell in json.loads(path.read_text(encoding="utf-8"))["cells"].items():
        popularity, gpu = name.split(", ")[0], name.split(", ")[-1]
        if gpu in COSTS:
            found[name] = {
                "measured": _measured(cell["results"]),
                "simulated": _replay(cell["setting"], popularity, COSTS[gpu]),
            }
    return found


def _measured(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_s": results["tokens_per_s"],
        "adapters_a_forward": results["mean_adapters_of_a_forward"],
        **_spread(results["first_token_s"], "first_token", "s"),
        **_spread(results["between_tokens_ms"], "between_tokens", "ms"),
    }


def _replay(setting: Mapping[str, Any], popularity: Any, costs: str) -> dict[str, float]:
    rng, requests = random.Random(setting["seed"]), setting["requests"]
    adapters = adapters_of(requests, popularity, rng)
    asked = trace([0.0] * requests, adapters, punica_lengths, rng)
    # As many tokens as the engine's cache had, see `llamas.blocks`; in smaller blocks, as the policy wants some free.
    limits = Limits(setting["batch"], setting["batch"] * (setting["tokens"] + 256) // 16, 16)
    hardware = Hardware(read_costs(costs), slots=2 * setting["batch"], ranks=(setting["rank"],))
    outcome = simulate(asked, Punica(Policy(most=1), limits), hardware, sample=None, gaps=True)
    found = summary(outcome)
    return {
        "tokens_per_s": found["tokens_per_s"],
        "adapters_a_forward": found["adapters_a_forward"],
        **_spread(found["first_token_s"], "first_token", "s"),
        **_spread(gap_quantiles(outcome.counts.gaps or ()), "between_tokens", "ms"),
    }


def _spread(values: Mapping[str, float], name: str, unit: str) -> dict[str, float]:
    return {f"{name}_{key}_{unit}": values[key] for key in ("p50", "p99")}
