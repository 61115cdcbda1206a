"""Workloads: who asks when, for which adapter, and how long. For benchmarks and simulations, repeatable by a seed.

Punica's four popularities (Chen et al., MLSys 2024), S-LoRA's power law and Gamma arrivals (Sheng et al., MLSys 2024),
and traces as JSON lines, so that a recorded one can be played again. Pure Python: knows numbers of tokens and numbers
of adapters; no model and no clock.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import ConfigError

Popularity = Literal["distinct", "uniform", "skewed", "identical"]
POPULARITIES: tuple[Popularity, ...] = ("distinct", "uniform", "skewed", "identical")
SKEW = 1.5
"""How many times more requests the next more popular adapter has: the paper's "Zipf-1.5"."""

Lengths = Callable[[random.Random], tuple[int, int]]
"""Draws a request's prompt and its answer, in tokens."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request of a trace.

    Attributes:
        arrival: seconds from the trace's beginning.
        adapter: the adapter's number.
        prompt_tokens: the prompt's length.
        new_tokens: the answer's.
    """

    arrival: float
    adapter: int
    prompt_tokens: int
    new_tokens: int


def group_sizes(requests: int, popularity: Popularity) -> list[int]:
    """How many of so many requests each adapter has, the most popular first.

    Args:
        requests: at least 1.
        popularity: "distinct", an adapter a request; "uniform", ⌈√n⌉ adapters with equal shares; "skewed", shares that
            grow by `SKEW` from 1 on, and one of what is left; "identical", one adapter for all.

    Raises:
        ConfigError: there is no such popularity.
    """
    assert requests >= 1
    if popularity == "identical":
        return [requests]
    if popularity == "distinct":
        return [1] * requests
    if popularity == "uniform":
        adapters = math.isqrt(requests - 1) + 1
        share, more = divmod(requests, adapters)
        return [share + (place < more) for place in range(adapters)]
    if popularity == "skewed":
        sizes: list[int] = []
        size = 1.0
        while sum(sizes) + int(size) < requests:
            sizes.append(int(size))
            size *= SKEW
        return sorted([*sizes, requests - sum(sizes)], reverse=True)
    raise ConfigError(f"there is no popularity {popularity!r}; there are {', '.join(POPULARITIES)}.")


def adapters_of(requests: int, popularity: Popularity, rng: random.Random) -> list[int]:
    """The adapter of each request, in a random order. See `group_sizes`."""
    found = [adapter for adapter, size in enumerate(group_sizes(requests, popularity)) for _ in range(size)]
    rng.shuffle(found)
    return found


def power_law(requests: int, adapters: int, alpha: float, rng: random.Random) -> list[int]:
    """The adapter of each request, drawn so that the i-th most popular has a share ∝ i^−α (S-LoRA).

    Args:
        requests: how many.
        adapters: how many there are to draw from.
        alpha: 0 for equal shares; S-LoRA has 0.1 to 1.
        rng: draws.
    """
    shares = list(accumulate((1 + place) ** -alpha for place in range(adapters)))
    return rng.choices(range(adapters), cum_weights=shares, k=requests)


def gamma_arrivals(requests: int, rate: float, rng: random.Random, *, cv: float = 1.0) -> list[float]:
    """Arrivals whose gaps are Gamma distributed, of shape 1/cv² and scale cv²/rate.

    Args:
        requests: how many.
        rate: requests a second.
        rng: draws.
        cv: the gaps' coefficient of variation; 1 is a Poisson process, more comes in bursts.
    """
    return list(accumulate(rng.gammavariate(1 / cv**2, cv**2 / rate) for _ in range(requests)))


def wave_arrivals(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """A Poisson process whose rate rises to its most in the middle and falls again, as in Punica's cluster experiment.

    At t the rate is rate · (1.2 − cos(2π t / T)) / 2.2; drawn by thinning.

    Args:
        rate: the most, in requests a second.
        seconds: T.
        rng: draws.
    """
    found = []
    now = rng.expovariate(rate)
    while now < seconds:
        if rng.random() < (1.2 - math.cos(2 * math.pi * now / seconds)) / 2.2:
            found.append(now)
        now += rng.expovariate(rate)
    return found


def punica_lengths(rng: random.Random) -> tuple[int, int]:
    """As Punica's benchmark draws: prompts of a shifted lognormal (σ 0.8, loc −1, scale 18), totals U(0, 2048)."""
    prompt = max(2, round(rng.lognormvariate(math.log(18), 0.8) - 1))
    total = rng.randint(0, 2048)
    return min(prompt, 2046), max(1, total - prompt)


def chat_lengths(rng: random.Random) -> tuple[int, int]:
    """A fit to real chats: prompts lognormal(3.89, 1.80), answers lognormal(5.25, 1.15); at most 4,096 tokens each."""
    prompt, answer = rng.lognormvariate(3.89, 1.80), rng.lognormvariate(5.25, 1.15)
    return min(4096, max(1, round(prompt))), min(4096, max(1, round(answer)))


def slora_lengths(rng: random.Random) -> tuple[int, int]:
    """S-LoRA's synthetic trace: both U[8, 512)."""
    return rng.randrange(8, 512), rng.randrange(8, 512)


def trace(arrivals: Sequence[float], adapters: Sequence[int], lengths: Lengths, rng: random.Random) -> list[Asked]:
    """Requests in the order of their arrivals.

    Args:
        arrivals: seconds; as many as adapters.
        adapters: the adapter of each.
        lengths: draws the lengths of each.
        rng: draws.
    """
    return [Asked(arrival, adapter, *lengths(rng)) for arrival, adapter in zip(sorted(arrivals), adapters, strict=True)]


LENGTHS: dict[str, Lengths] = {"punica": punica_lengths, "chat": chat_lengths, "slora": slora_lengths}
"""How lengths are drawn, by name."""


def punica_hour(rate: float, seconds: float, popularity: str, lengths: str, seed: int) -> list[Asked]:
    """Punica's cluster experiment: a load that rises and falls.

    Args:
        rate: the most, in requests a second, see `wave_arrivals`.
        seconds: of the trace.
        popularity: see `group_sizes`.
        lengths: one of `LENGTHS`.
        seed: repeats it.

    Raises:
        ConfigError: there is no such popularity, there are no such lengths, or no request came.
    """
    if popularity not in POPULARITIES:
        raise ConfigError(f"there is no popularity {popularity!r}; there are {', '.join(POPULARITIES)}.")
    if lengths not in LENGTHS:
        raise ConfigError(f"there are no lengths {lengths!r}; there are {', '.join(LENGTHS)}.")
    rng = random.Random(seed)
    arrivals = wave_arrivals(rate, seconds, rng)
    if not arrivals:
        raise ConfigError(f"no request came in {seconds:g} s at up to {rate:g} a second; let it last longer.")
    return trace(arrivals, adapters_of(len(arrivals), popularity, rng), LENGTHS[lengths], rng)


def write_trace(asked: Iterable[Asked], path: str | Path) -> None:
    """Writes a trace as JSON lines, a request each."""
    lines = (json.dumps(dataclasses.asdict(one)) + "\n" for one in asked)
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_trace(path: str | Path) -> list[Asked]:
    """Reads a trace, in the order of arrival.

    Raises:
        ConfigError: the file cannot be read, or a line is no request; with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}.") from error
    return sorted(_asked(lines, path), key=lambda one: one.arrival)


def _asked(lines: Sequence[str], path: str | Path) -> Iterator[Asked]:
    fields = {field.name: field.type for field in dataclasses.fields(Asked)}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found: dict[str, Any] = json.loads(line)
            one = Asked(**{name: found[name] for name in fields})
            counts = (one.adapter, one.prompt_tokens - 1, one.new_tokens - 1)
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("adapter is a number from 0 on, prompt_tokens and new_tokens are at least 1")
            if not (isinstance(one.arrival, int | float) and 0 <= one.arrival < math.inf):
                raise ValueError("arrival is a number of seconds")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: this is no request of a trace: {error}.") from error
        yield one
