"""engine-workloads: Punica's four popularities through the engine on a GPU, in batches of at most 32.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers, Punica's lengths. All requests are there
from the beginning and are served in their order, as in Punica's own benchmark. Its script mixes no adapters, whatever
the popularity; here the mean number of adapters a forward is counted.

Two numbers, a step of 32 rows: see `engine_step`; 32 tokens in 6.8 ms are 4,700 tokens a second.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit.bench.engine_step import LLAMA_2_7B, Setting, base_of, random_bank
from lorakit.bench.harness import save, show
from lorakit.console import make_console
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.engine.handle import Completion
from lorakit.runtime.model import MultiLoraModel
from lorakit.workloads import POPULARITIES, Asked, adapters_of, punica_lengths, trace


class Workload(NamedTuple):
    """What is asked for.

    Attributes:
        requests: of each popularity.
        batch: the most rows.
        adapters: in the bank; a popularity that wants more gets these in turn.
        level: transformers' level of compilation.
        seed: of lengths and orders.
    """

    requests: int = 64
    batch: int = 32
    adapters: int = 64
    level: int = 0
    seed: int = 0


def run(folder: Path) -> None:
    """Measures, prints and saves `engine_workloads.json`; says so and does nothing where there is no GPU."""
    if not torch.cuda.is_available():
        make_console().print("engine-workloads: left out, it measures a GPU")
        return
    setting, workload = Setting(LLAMA_2_7B), Workload()
    results = measure(setting, workload, torch.device("cuda"))
    path = save("engine_workloads", folder, {**setting.as_json(), **workload._asdict()}, results)
    rows = [
        [
            name,
            f"{found['tokens_per_s']:.0f}",
            f"{found['mean_adapters_of_a_forward']:.1f}",
            f"{found['first_token_s']['p50']:.1f}",
            f"{found['between_tokens_ms']['p50']:.1f}",
            f"{found['between_tokens_ms']['p99']:.1f}",
        ]
        for name, found in results.items()
    ]
    columns = ["", "tokens/s", "adapters a forward", "first token p50 s", "between tokens p50 ms", "p99 ms"]
    show("Punica's workloads, Llama-2-7B shape", columns, rows, path)


def measure(setting: Setting, workload: Workload, device: torch.device) -> dict[str, Any]:
    """Popularity → throughput, latencies, and how mixed the batches were."""
    base = base_of(setting, device)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
        bank = random_bank(base, Path(place) / "bank", workload.adapters, setting)
        model = MultiLoraModel(base, bank)
        config = EngineConfig(
            max_requests=workload.batch, prefix_cache=False, cuda_graphs=None, compile_level=workload.level
        )
        with Engine(model, config) as engine:
            for popularity in POPULARITIES:
                rng = random.Random(workload.seed)
                adapters = adapters_of(workload.requests, popularity, rng)
                asked = trace([0.0] * workload.requests, adapters, punica_lengths, rng)
                if not found:  # once beforehand, for what is compiled and captured on the way
                    brief = [dataclasses.replace(one, new_tokens=min(one.new_tokens, 32)) for one in asked]
                    _served(engine, brief, bank.names, setting.shape["vocab_size"])
                found[popularity] = _served(engine, asked, bank.names, setting.shape["vocab_size"])
    return found


def _served(engine: Engine, asked: list[Asked], names: list[str], vocabulary: int) -> dict[str, Any]:
    rng = random.Random(1)
    prompts = [[rng.randrange(5, vocabulary) for _ in range(one.prompt_tokens)] for one in asked]
    before = engine.stats()
    started = time.perf_counter()
    handles = [
        engine.submit(
            prompt,
            names[one.adapter % len(names)],
            max_new_tokens=one.new_tokens,
            ignore_eos=True,
            tenant="all",  # in their order, as Punica serves them
        )
        for prompt, one in zip(prompts, asked, strict=True)
    ]
    completions = [handle.result() for handle in handles]
    seconds = time.perf_counter() - started
    stats = engine.stats()
    return {
        "seconds": seconds,
        "tokens_per_s": sum(len(one.token_ids) for one in completions) / seconds,
        "mean_adapters_of_a_forward": (stats.segments - before.segments) / (stats.steps - before.steps),
        "first_token_s": _quantiles([one.times[0] for one in completions]),
        "between_tokens_ms": _quantiles([1e3 * gap for one in completions for gap in _gaps(one)]),
    }


def _gaps(completion: Completion) -> list[float]:
    return [later - before for before, later in zip(completion.times, completion.times[1:], strict=False)]


def _quantiles(values: list[float]) -> dict[str, float]:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.99], dtype=torch.float64))
    return dict(zip(("p50", "p99"), quantiles.tolist(), strict=True))
