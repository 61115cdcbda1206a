"""What a replica's forwards take, measured on purpose, for a simulation of engines of which no measurement is saved.

forwards without prompts    so many rows, with none, one or as many adapters, of short and of long contexts: the
                            median time between tokens while all of them run
forwards that begin one     prompts of several lengths alone: the time to the first token
loads                       how much longer the first token takes if its adapter comes with it
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lorakit.engine.engine import Engine
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.costs import SECOND, Costs
from lorakit.scheduler.fitting import Timed, fit_forwards

_MS = SECOND // 1000
_PROMPTS = (4, 16, 64, 256)
_SHORT, _TOKENS = 8, 24


class Measured(NamedTuple):
    """What was measured.

    Attributes:
        forwards: decoded rows, and prompts.
        load_ms: an adapter's load, several times.
    """

    forwards: list[Timed]
    load_ms: list[float]


def measure(
    engine: Engine | Cluster, batch: int, names: Sequence[str], rank: int, vocabulary: int, longest: int, rounds: int
) -> Measured:
    """Measures an engine, or a cluster of one replica, that serves nobody else.

    Args:
        engine: it.
        batch: the most rows, as many as it takes at once.
        names: adapters, none of which it has brought to its device yet; more than a batch.
        rank: theirs.
        vocabulary: tokens to draw prompts from.
        longest: tokens of the long contexts.
        rounds: how often all is measured.
    """
    rng = random.Random(0)
    loads = list(_loads(engine, names, vocabulary, rng))
    forwards: list[Timed] = []
    sizes = sorted({1, max(1, batch // 4), max(1, batch // 2), batch})
    for _ in range(rounds):
        for rows, prompt in itertools.product(sizes, (_SHORT, longest)):
            for adapters in sorted({0, 1, rows}):
                forwards.append(_decoded(engine, names[:adapters], rank, _prompts(rows, prompt, vocabulary, rng)))
        for prompt in _PROMPTS:
            ms = 1e3 * _first(engine, names[0], _prompts(1, prompt, vocabulary, rng)[0])
            forwards.append(Timed(rows=0, context=0, ranks=rank, prompt=prompt, ms=ms))
    return Measured(forwards, loads)


def costs_of(measured: Iterable[Measured]) -> Costs:
    """The costs that fit what was measured, in one process or in several."""
    found = list(measured)
    milliseconds = fit_forwards(forward for one in found for forward in one.forwards)
    milliseconds["load"] = max(0.0, statistics.median(load for one in found for load in one.load_ms))
    picoseconds = {name: round(value * _MS) for name, value in milliseconds.items()}
    return Costs(**{**picoseconds, "step": max(1, picoseconds["step"])})


def _prompts(rows: int, tokens: int, vocabulary: int, rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(5, vocabulary) for _ in range(tokens)] for _ in range(rows)]


def _decoded(engine: Engine | Cluster, names: Sequence[str], rank: int, prompts: Sequence[Sequence[int]]) -> Timed:
    """The median forward while all rows run."""
    handles = [
        engine.submit(prompt, names[row % len(names)] if names else None, max_new_tokens=_TOKENS, ignore_eos=True)
        for row, prompt in enumerate(prompts)
    ]
    times = [
        [handle.submitted + time for time in completion.times]
        for handle, completion in zip(handles, [handle.result() for handle in handles], strict=True)
    ]
    begun, ended = max(one[0] for one in times), min(one[-1] for one in times)
    gaps = [
        later - before
        for one in times
        for before, later in itertools.pairwise(one)
        if begun <= before and later <= ended
    ] or [later - before for one in times for before, later in itertools.pairwise(one)]
    context = sum(len(prompt) + _TOKENS / 2 for prompt in prompts)
    return Timed(len(prompts), context, rank * len(names), 0, 1e3 * statistics.median(gaps))


def _loads(engine: Engine | Cluster, names: Sequence[str], vocabulary: int, rng: random.Random) -> Iterator[float]:
    """Milliseconds by which a first token comes later for an adapter that is not there yet."""
    prompts = _prompts(2, _SHORT, vocabulary, rng)
    _first(engine, names[0], prompts[0])  # what the first of all requests takes is no load
    for name in names[1:]:
        first, second = (_first(engine, name, prompt) for prompt in prompts)
        yield 1e3 * (first - second)


def _first(engine: Engine | Cluster, name: str, prompt: Sequence[int]) -> float:
    """Seconds to the first token of a request that is alone."""
    return engine.submit(prompt, name, max_new_tokens=1, ignore_eos=True).result().times[0]
