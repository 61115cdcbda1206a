"""A simulation's outcome in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lorakit.scheduler.bound import clairvoyant_gpu_time, least_gpu_time
from lorakit.scheduler.costs import SECOND
from lorakit.scheduler.replica import Gap
from lorakit.scheduler.simulator import Hardware, Outcome
from lorakit.scheduler.snapshot import Limits
from lorakit.workloads import Asked

_HOUR = 3600 * SECOND


def bounds(trace: Sequence[Asked], hardware: Hardware, limits: Limits) -> dict[str, float]:
    """The GPU-hours that a trace takes at least, see `bound`."""
    least = least_gpu_time(trace, hardware.costs, limits, hardware.ranks)
    clairvoyant = clairvoyant_gpu_time(trace, hardware.costs, limits, hardware.ranks)
    return {"any_schedule_gpu_hours": least / _HOUR, "clairvoyant_gpu_hours": clairvoyant / _HOUR}


def summary(outcome: Outcome) -> dict[str, Any]:
    """GPUs, latencies, moves and batches.

    Returns:
        Numbers by name, their units in the names. `time_in_moves_percent` is the share of the requests' time, from
        arrival to last token, that lies between leaving a replica for another and the next token there.
    """
    jobs, counts = outcome.jobs, outcome.counts
    arrivals = np.array([job.arrival for job in jobs], dtype=np.int64)
    first = np.array([job.first for job in jobs], dtype=np.int64)
    finished = np.array(outcome.finished, dtype=np.int64)
    several = np.array([job.new_tokens for job in jobs]) > 1
    steps = np.array([max(1, job.new_tokens - 1) for job in jobs])
    taken = float((finished - arrivals).sum())
    tokens = sum(job.new_tokens for job in jobs)
    return {
        "requests": len(jobs),
        "gpu_hours": outcome.gpu_time / _HOUR,
        "busy_percent": 100 * counts.busy / max(1, outcome.gpu_time),
        "most_gpus": outcome.most,
        "gpus_started": outcome.asked,
        "first_token_s": quantiles((first - arrivals) / SECOND),
        "token_ms": quantiles(((finished - first) / steps)[several] / SECOND * 1e3),
        "request_s": quantiles((finished - arrivals) / SECOND),
        "moves": outcome.moves,
        "time_in_moves_percent": 100 * sum(job.moving for job in jobs) / max(1.0, taken),
        "evictions": outcome.evictions,
        "loads": counts.loads,
        "rows_a_forward": counts.rows / max(1, counts.forwards),
        "adapters_a_forward": counts.segments / max(1, counts.forwards),
        "tokens_per_s": tokens / (outcome.end / SECOND),
        "seconds": outcome.end / SECOND,
    }


def quantiles(values: Any) -> dict[str, float]:
    """The median, and what one of a hundred exceeds; 0 of none."""
    if not len(values):
        return {"p50": 0.0, "p99": 0.0}
    return {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}


def gap_quantiles(gaps: Sequence[Gap]) -> dict[str, float]:
    """The median time between tokens, and what one of a hundred exceeds, in milliseconds."""
    if not gaps:
        return {"p50": 0.0, "p99": 0.0}
    times = np.concatenate([gap.first + gap.growth * np.arange(gap.forwards, dtype=np.int64) for gap in gaps])
    rows = np.concatenate([np.full(gap.forwards, gap.rows) for gap in gaps])
    order = np.argsort(times)
    shares = np.cumsum(rows[order]) / rows.sum()
    p50, p99 = (float(times[order][np.searchsorted(shares, share)]) / SECOND * 1e3 for share in (0.5, 0.99))
    return {"p50": p50, "p99": p99}


def over_time(outcome: Outcome, seconds: float) -> dict[str, list[float]]:
    """Median and p99 time to first token of the requests that arrived in each window of so many seconds."""
    return first_tokens(((job.arrival / SECOND, (job.first - job.arrival) / SECOND) for job in outcome.jobs), seconds)


def first_tokens(requests: Iterable[tuple[float, float]], seconds: float) -> dict[str, list[float]]:
    """The same of arrivals and times to first token, in seconds."""
    windows: dict[int, list[float]] = {}
    for arrival, first in requests:
        windows.setdefault(int(arrival // seconds), []).append(first)
    found: dict[str, list[float]] = {"seconds": [], "p50": [], "p99": []}
    for window, values in sorted(windows.items()):
        found["seconds"].append(window * seconds)
        for name, value in quantiles(np.array(values)).items():
            found[name].append(value)
    return found
