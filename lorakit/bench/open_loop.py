"""A trace served by a cluster, each request when it arrives and whoever still waits; and what came of it."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from lorakit.engine.handle import RequestHandle
from lorakit.errors import LorakitError
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.flight import Flight
from lorakit.scheduler.sample import Sample
from lorakit.scheduler.summary import quantiles
from lorakit.workloads import Asked

_LOOK = 0.1  # seconds between two samples


class Served(NamedTuple):
    """What became of a request. Times are seconds from the trace's beginning.

    Attributes:
        arrival: when it was to be submitted.
        late: by how many seconds it was later.
        begun_in: seconds from being given to its replica until its first token; None if it moved or has none.
        times: when its tokens came.
        replicas: that it was given to, in order.
        moves: how often it was moved.
        evictions: how often it was evicted.
        error: what it failed by.
    """

    arrival: float
    late: float
    begun_in: float | None
    times: tuple[float, ...]
    replicas: tuple[int, ...]
    moves: int
    evictions: int
    error: str | None


class Run(NamedTuple):
    """A trace that was served.

    Attributes:
        served: each request, in the order of the trace.
        samples: the cluster, ten times a second.
        seconds: until the last request ended.
    """

    served: list[Served]
    samples: list[Sample]
    seconds: float


def serve(
    cluster: Cluster,
    asked: Sequence[Asked],
    names: Sequence[str],
    vocabulary: int,
    *,
    patience: float = 600.0,
    ended: Callable[[], object] = lambda: None,
) -> Run:
    """Serves a trace.

    Args:
        cluster: serves nobody else.
        asked: the trace, in the order of arrival; as many tokens as it says are generated of each.
        names: the adapters, by the trace's numbers.
        vocabulary: tokens to draw prompts from.
        patience: seconds after the last arrival after which a request counts as failed that has not ended.
        ended: called when a request has ended.
    """
    rng = random.Random(1)
    prompts = [[rng.randrange(5, vocabulary) for _ in range(one.prompt_tokens)] for one in asked]
    began = time.monotonic()
    handles: list[RequestHandle | LorakitError] = []
    with _sampled(cluster, began) as samples:
        for prompt, one in zip(prompts, asked, strict=True):
            time.sleep(max(0.0, began + one.arrival - time.monotonic()))
            # One tenant: they are served in the order of arrival, as Punica does.
            settings = {"max_new_tokens": one.new_tokens, "ignore_eos": True, "tenant": "all"}
            try:
                handles.append(cluster.submit(prompt, names[one.adapter], **settings))
            except LorakitError as error:
                handles.append(error)
        limit = time.monotonic() + patience
        for handle in handles:
            if isinstance(handle, RequestHandle):
                handle.wait(max(0.0, limit - time.monotonic()))
            ended()
        seconds = time.monotonic() - began
    served = [_served(one, handle, began) for one, handle in zip(asked, handles, strict=True)]
    return Run(served, samples, seconds)


def _served(one: Asked, handle: RequestHandle | LorakitError, began: float) -> Served:
    if not isinstance(handle, RequestHandle):
        return Served(one.arrival, 0.0, None, (), (), 0, 0, _told(handle))
    (flight,) = handle.parts
    assert isinstance(flight, Flight)
    completion, error = handle.completion(), handle.error
    submitted = handle.submitted - began
    told = None if completion is not None else "it has not ended" if error is None else _told(error)
    stayed = len(flight.been) == 1
    return Served(
        one.arrival,
        submitted - one.arrival,
        handle.submitted + completion.times[0] - flight.given if completion is not None and stayed else None,
        () if completion is None else tuple(submitted + time for time in completion.times),
        tuple(flight.been),
        flight.moves,
        flight.evictions,
        told,
    )


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _sampled(cluster: Cluster, began: float) -> Iterator[list[Sample]]:
    """Samples a cluster, in a thread of its own, until it is left."""
    samples: list[Sample] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(_LOOK):
            samples.append(cluster.sample(began))

    thread = threading.Thread(target=look, name="samples", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def numbered(samples: Iterable[Sample]) -> list[Sample]:
    """The same, with replicas numbered as simulated GPUs are: by the lowest number that is free, from the start on.

    Those that start have an empty working set, and keep their number when they serve.
    """
    found: list[Sample] = []
    numbers: dict[int, int] = {}
    starting: list[int] = []
    for sample in samples:
        numbers = {one: number for one, number in numbers.items() if one in sample.working_sets}
        for one in sample.working_sets.keys() - numbers.keys():
            numbers[one] = starting.pop(0) if starting else _free({*numbers.values()})
        count = sample.gpus - len(sample.working_sets)
        starting = starting[: max(0, count)]
        while len(starting) < count:
            starting.append(_free({*numbers.values(), *starting}))
        sets = {numbers[one]: size for one, size in sample.working_sets.items()} | dict.fromkeys(starting, 0)
        found.append(Sample(sample.seconds, sample.gpus, sample.waiting, sets))
    return found


def _free(taken: set[int]) -> int:
    return next(number for number in range(len(taken) + 1) if number not in taken)


def starts(samples: Iterable[Sample]) -> list[float]:
    """Seconds that replicas took from being asked for until they served; beyond those that were there."""
    found: list[float] = []
    asked: list[float] = []
    gpus, serving = None, 0
    for sample in samples:
        now = len(sample.working_sets)
        if gpus is not None:
            asked += [sample.seconds] * (sample.gpus - gpus)
            for _ in range(now - serving):
                if asked:
                    found.append(sample.seconds - asked.pop(0))
            asked = asked[: max(0, sample.gpus - now)]  # those that are not wanted any more
        gpus, serving = sample.gpus, now
    return found


def thinned(samples: Sequence[Sample], seconds: float) -> list[Sample]:
    """One of every so many seconds."""
    found: list[Sample] = []
    for sample in samples:
        if not found or sample.seconds >= found[-1].seconds + seconds - _LOOK / 2:
            found.append(sample)
    return found


def gpu_seconds(run: Run) -> float:
    """Seconds of GPUs, from being asked for until they are given back, or the last request has ended."""
    edges = [0.0, *(sample.seconds for sample in run.samples[1:]), run.seconds]
    return sum((end - begin) * one.gpus for one, begin, end in zip(run.samples, edges, edges[1:], strict=False))


def summary(run: Run) -> dict[str, Any]:
    """A run in numbers, by the names that a simulation's summary has for them."""
    answered = [one for one in run.served if one.error is None]
    gpus = [sample.gpus for sample in run.samples]
    gaps = np.concatenate([np.diff(one.times) for one in answered] or [np.zeros(0)])
    return {
        "requests": len(run.served),
        "answered": len(answered),
        "errors": len(run.served) - len(answered),
        "error_texts": sorted({one.error for one in run.served if one.error is not None})[:5],
        "gpu_hours": gpu_seconds(run) / 3600,
        "most_gpus": max(gpus),
        "gpus_started": sum(max(0, later - before) for before, later in itertools.pairwise(gpus)),
        "first_token_s": quantiles(np.array([one.times[0] - one.arrival for one in answered])),
        "between_tokens_ms": {**quantiles(1e3 * gaps), "mean": 1e3 * float(gaps.mean()) if len(gaps) else 0.0},
        "begun_in_ms": quantiles(np.array([1e3 * one.begun_in for one in answered if one.begun_in is not None])),
        "request_s": quantiles(np.array([one.times[-1] - one.arrival for one in answered])),
        "moves": sum(one.moves for one in run.served),
        "evictions": sum(one.evictions for one in run.served),
        "on_several_replicas": sum(len(one.replicas) > 1 for one in run.served),
        "tokens_per_s": sum(len(one.times) for one in answered) / run.seconds,
        "seconds": run.seconds,
        "submitted_late_ms": quantiles(np.array([1e3 * one.late for one in run.served])),
    }
