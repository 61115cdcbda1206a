"""What benchmarks of the engine share: its settings, requests served and counted, steps timed."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit.bench.harness import save
from lorakit.console import make_console
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.engine.handle import Completion
from lorakit.workloads import Asked

Serve = Callable[[int], object]
"""Generates so many tokens in every row."""


def has_gpu(name: str) -> bool:
    """Whether there is a GPU to measure; says so if there is none."""
    if not torch.cuda.is_available():
        make_console().print(f"{name}: left out, it measures a GPU")
        return False
    return True


def save_each(
    name: str, folder: Path, setting: dict[str, Any], states: Iterable[dict[str, Any]], *, seconds: float | None = None
) -> tuple[Path, dict[str, Any]]:
    """Saves a benchmark's results after each of its parts, so that a run that is cut off loses only the last one.

    Args:
        name: the benchmark's.
        folder: where to.
        setting: as `save` takes it.
        states: the results so far, after each part.
        seconds: no part begins after so many.

    Returns:
        The file, and what is in it.
    """
    began = time.monotonic()
    path, results = folder / f"{name}.json", dict[str, Any]()
    for results in states:
        path = save(name, folder, setting, results)
        if seconds is not None and time.monotonic() - began > seconds:
            make_console().print(f"{name}: stopped after {seconds:.0f} s")
            break
    return path, results


def allow_compiling() -> None:
    """A layer of a model is an entry of torch's compiler: the default of 8 leaves most layers out."""
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)


def engine_config(rows: int, cache: int, device: torch.device, *, level: int = 0) -> EngineConfig:
    """An engine for so many rows.

    Args:
        rows: of a batch.
        cache: bytes of the key-value cache on a GPU; elsewhere the engine has its own.
        device: where it runs.
        level: transformers' level of compilation.
    """
    memory = cache if device.type == "cuda" else None
    return EngineConfig(max_requests=rows, prefix_cache=False, compile_level=level, cache_memory=memory)


class Counters(NamedTuple):
    """What an engine has done until now.

    Attributes:
        steps: forwards.
        segments: adapters of each of them, summed.
        loads: adapters that were brought to the device.
        loaded_bytes: of them.
        evictions: adapters that made room.
    """

    steps: int
    segments: int
    loads: int
    loaded_bytes: int
    evictions: int

    @classmethod
    def of(cls, engine: Engine) -> Counters:
        """Reads an engine's."""
        stats = engine.stats()
        with engine.model.lock:
            pool = engine.model.pool
            return cls(stats.steps, stats.segments, pool.loads, pool.loaded_bytes, pool.evictions)


def cut(asked: Iterable[Asked], longest: int | None) -> list[Asked]:
    """The same requests, of at most so many new tokens."""
    return [
        one if longest is None else dataclasses.replace(one, new_tokens=min(one.new_tokens, longest)) for one in asked
    ]


def serve_trace(engine: Engine, asked: Sequence[Asked], names: Sequence[str], vocabulary: int) -> dict[str, Any]:
    """Serves a trace, each request when it arrives, and tells how it went.

    Args:
        engine: serves in the order of arrival, as S-LoRA and Punica do.
        asked: the trace; an adapter that names does not have is one that it has, in turn.
        names: the adapters.
        vocabulary: the base's tokens.
    """
    rng = random.Random(1)
    prompts = [[rng.randrange(5, vocabulary) for _ in range(one.prompt_tokens)] for one in asked]
    before = Counters.of(engine)
    started = time.perf_counter()
    handles = []
    for prompt, one in zip(prompts, asked, strict=True):
        time.sleep(max(0.0, started + one.arrival - time.perf_counter()))
        name = names[one.adapter % len(names)]
        handles.append(engine.submit(prompt, name, max_new_tokens=one.new_tokens, ignore_eos=True, tenant="all"))
    completions = [handle.result() for handle in handles]
    seconds = time.perf_counter() - started
    steps, segments, loads, loaded, evictions = (
        now - then for now, then in zip(Counters.of(engine), before, strict=True)
    )
    return {
        "seconds": seconds,
        "requests_per_s": len(asked) / seconds,
        "tokens_per_s": sum(len(one.token_ids) for one in completions) / seconds,
        "adapters_asked_for": len({one.adapter % len(names) for one in asked}),
        "mean_adapters_of_a_forward": segments / steps,
        "loads": loads,
        "loaded_GB": loaded / 1e9,
        "evictions": evictions,
        "first_token_s": quantiles([one.times[0] for one in completions]),
        "between_tokens_ms": quantiles([1e3 * gap for one in completions for gap in gaps(one)]),
    }


def gaps(completion: Completion) -> Iterator[float]:
    """Seconds between tokens."""
    return (later - before for before, later in zip(completion.times, completion.times[1:], strict=False))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and what one of a hundred exceeds."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.99], dtype=torch.float64))
    return dict(zip(("p50", "p99"), found.tolist(), strict=True))


def step_ms(serve: Serve, short: int, long: int) -> float:
    """Milliseconds of a step: the difference of a long run's and a short one's, over the tokens between."""
    seconds = [_timed(serve, tokens) for tokens in (short, long)]
    return (seconds[1] - seconds[0]) / (long - short) * 1e3


def _timed(serve: Serve, tokens: int) -> float:
    started = time.perf_counter()
    serve(tokens)
    return time.perf_counter() - started


def serve_rows(
    engine: Engine, prompts: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int, **sampling: Any
) -> list[Completion]:
    """Generates so many tokens in every row."""
    return engine.generate(prompts, names, max_new_tokens=tokens, ignore_eos=True, progress=False, **sampling)
