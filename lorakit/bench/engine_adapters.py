"""engine-adapters: the same requests with 5 and with 2,000 adapters on one GPU.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers, S-LoRA's synthetic lengths (Sheng et al.,
MLSys 2024). Both traces have the same prompts, answers and arrivals; only which adapter a request asks for differs.
They are served in turn by one engine that knows all 2,000 adapters. The adapters lie in host memory, as S-LoRA's do;
what base and cache leave of the device is theirs, and is full before the first round, so that with 2,000 nearly every
request loads one, in the place of another.

2,000 adapters are 160 GB, more than the host has: they have 32 contents in host memory (`random_bank.py` says what that
shares and what it does not). The few are among the many, so what merely knowing an adapter costs is in both.

Two numbers: at 10 requests a second, 10 loads of 80 MB are 0.8 GB/s of the 55 GB/s that the bus has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit.bench.harness import show, statistics_of
from lorakit.bench.llamas import Llama, with_liger
from lorakit.bench.plots import bars
from lorakit.bench.random_bank import CONTENTS, RandomBank
from lorakit.bench.served import allow_compiling, cut, engine_config, has_gpu, save_each, serve_trace
from lorakit.engine.engine import Engine
from lorakit.runtime.arena import aligned
from lorakit.runtime.model import MultiLoraModel
from lorakit.workloads import Asked, gamma_arrivals, power_law, slora_lengths, trace

RESERVE = 12 << 30
"""Bytes of a GPU for what is computed on the way, and for graphs."""


class Workload(NamedTuple):
    """What is asked for.

    Attributes:
        counts: of adapters; each round serves each in turn.
        requests: of a round and a count.
        alpha: the i-th most popular adapter has a share ∝ i^−alpha; 0 for equal shares.
        rate: requests a second, a Poisson process; None: all are there from the beginning.
        longest: new tokens of a request at most; None: as many as drawn.
        batch: the most rows.
        tokens: for so many in each row the cache has room.
        rounds: of each count.
        contents: of the adapters, see `RandomBank`.
        adapter_memory: bytes on the device; None: what is left there.
        liger: with liger-kernel's kernels, if it is installed.
        seed: of the trace; which adapters are asked for also depends on the round.
    """

    counts: Sequence[int] = (5, 2000)
    requests: int = 192
    alpha: float = 0.0
    rate: float | None = None
    longest: int | None = None
    batch: int = 32
    tokens: int = 1024
    rounds: int = 3
    contents: int = CONTENTS
    adapter_memory: int | None = None
    liger: bool = True
    seed: int = 0


def run(folder: Path) -> None:
    """Measures, prints and saves `engine_adapters.json`; says so and does nothing where there is no GPU."""
    if has_gpu("engine-adapters"):
        run_workload(folder, Llama(), Workload(), torch.device("cuda"))


def run_workload(
    folder: Path, llama: Llama, workload: Workload, device: torch.device, *, seconds: float | None = None
) -> None:
    """Measures, prints and saves one workload; no round begins after so many seconds."""
    setting = {**llama.as_json(), **workload._asdict()}
    states = measure(llama, workload, device)
    path, results = save_each("engine_adapters", folder, setting, states, seconds=seconds)
    plot(results, path.with_suffix(".png"))
    rows = [[name, *(f"{found[key]['median']:.3g}" for key in _SHOWN)] for name, found in results.items()]
    show("The same trace, Llama-2-7B shape: medians", ["", *(key.replace("_", " ") for key in _SHOWN)], rows, path)


_SHOWN = (
    "requests_per_s",
    "requests_per_s_of_the_fewest",
    "tokens_per_s",
    "loads",
    "loaded_GB",
    "evictions",
    "mean_adapters_of_a_forward",
)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each count."""
    medians = {name: found["requests_per_s"]["median"] for name, found in results.items()}
    bars(path, medians, "requests a second (median)", labels=[f"{rate:.2f}" for rate in medians.values()])


def measure(llama: Llama, workload: Workload, device: torch.device) -> Iterator[dict[str, Any]]:
    """Serves the counts in turn, round by round.

    Yields:
        Count → statistics over the rounds until now; ratios are to the first count's of the same round.
    """
    allow_compiling()
    base = llama.build(device)
    if workload.liger:
        with_liger(base, "engine-adapters")
    most = max(workload.counts)
    contents = min(workload.contents, most)
    bank = RandomBank(base, most, rank=llama.rank, dtype=llama.dtype, contents=contents)
    cache = llama.cache_bytes(workload.batch, workload.tokens)
    memory = workload.adapter_memory or _left(cache)
    model = MultiLoraModel(base, bank, adapter_memory=memory)
    bank.hold_in_host(model)
    fits = memory // max(aligned(entry.nbytes) for entry in bank.values())
    with Engine(model, engine_config(workload.batch, cache, device)) as engine:
        # What is compiled and captured on the way; then all room is taken, last by those that many ask for.
        serve_trace(engine, cut(_asked(workload, 1, 0), 32)[: 2 * workload.batch], bank.names, llama.vocabulary)
        for name in bank.names[-fits:]:
            model.load_adapter(name)
        rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in workload.counts}
        for number in range(workload.rounds):
            for count, found in rounds.items():
                found.append(serve_trace(engine, _asked(workload, count, number), bank.names, llama.vocabulary))
            yield {
                f"{count:,} adapters": {"fit_on_the_device": min(fits, count), **_together(found, rounds)}
                for count, found in rounds.items()
            }


def _asked(workload: Workload, adapters: int, number: int) -> list[Asked]:
    """A round's trace: of every round and count the same but for the adapters."""
    rng = random.Random(workload.seed)
    arrivals = [0.0] * workload.requests
    if workload.rate is not None:
        arrivals = gamma_arrivals(workload.requests, workload.rate, rng)
    chosen = power_law(workload.requests, adapters, workload.alpha, random.Random(f"{workload.seed} {number}"))
    return cut(trace(arrivals, chosen, slora_lengths, rng), workload.longest)


def _left(cache: int) -> int:
    """Bytes of the GPU that neither the base, nor the cache, nor the reserve takes."""
    free, _ = torch.cuda.mem_get_info()
    return free - cache - RESERVE


def _together(found: Sequence[dict[str, Any]], rounds: Mapping[int, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Statistics of every number over the rounds."""
    first = next(iter(rounds.values()))
    statistics: dict[str, Any] = {
        key: {at: statistics_of([one[key][at] for one in found]) for at in value}
        if isinstance(value, dict)
        else statistics_of([one[key] for one in found])
        for key, value in found[0].items()
    }
    ratios = [one["requests_per_s"] / other["requests_per_s"] for one, other in zip(found, first, strict=True)]
    return {**statistics, "requests_per_s_of_the_fewest": statistics_of(ratios)}
