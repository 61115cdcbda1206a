"""engine-workloads: Punica's four popularities through the engine on a GPU.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers, Punica's lengths. All requests are there
from the beginning and are served in their order, as in Punica's own benchmark. Its script mixes no adapters, whatever
the popularity; here the mean number of adapters a forward is counted.

A cell is a popularity at a batch size on a kind of GPU. Cells that were measured before stay in the file, each with the
machine, the commit and the number of requests that it was measured with: a thousand requests of a thousand tokens take
minutes.

Two numbers, a step of 32 rows: see `engine_step`; 32 tokens in 6.8 ms are 4,700 tokens a second.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit.bench.harness import save_cells, show
from lorakit.bench.llamas import Llama, with_liger
from lorakit.bench.random_bank import CONTENTS, RandomBank
from lorakit.bench.served import allow_compiling, cut, engine_config, has_gpu, serve_trace
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel
from lorakit.workloads import POPULARITIES, Asked, Popularity, adapters_of, punica_lengths, trace


class Workload(NamedTuple):
    """What is asked for.

    Attributes:
        popularities: in this order.
        requests: of each popularity.
        batch: the most rows.
        adapters: in the bank; as many as "distinct" wants if None, else a popularity that wants more gets these in
            turn.
        contents: of them, see `RandomBank`.
        liger: with liger-kernel's kernels, if it is installed.
        level: transformers' level of compilation.
        tokens: for so many in each row the cache has room; requests wait where there is none.
        longest: new tokens of a request at most; None: as many as drawn.
        seed: of lengths and orders.
    """

    popularities: Sequence[Popularity] = POPULARITIES
    requests: int = 64
    batch: int = 32
    adapters: int | None = None
    contents: int = CONTENTS
    liger: bool = True
    level: int = 0
    tokens: int = 1024
    longest: int | None = None
    seed: int = 0


def run(folder: Path) -> None:
    """Measures, prints and saves `engine_workloads.json`; says so and does nothing where there is no GPU."""
    if not has_gpu("engine-workloads"):
        return
    run_cells(folder, Llama(), Workload(), torch.device("cuda"))


def run_cells(folder: Path, llama: Llama, workload: Workload, device: torch.device) -> None:
    """Measures cells, saves each as soon as it is there, beside those of other runs, and prints all."""
    path, cells = folder / "engine_workloads.json", dict[str, Any]()
    for name, found in measure(llama, workload, device):
        path, cells = save_cells("engine_workloads", folder, name, {**llama.as_json(), **workload._asdict()}, found)
    rows = [[name, str(cell["setting"]["requests"]), *_row(cell["results"])] for name, cell in cells.items()]
    columns = ["", "requests", "tokens/s", "adapters a forward", "first token p50 s", "between tokens p50 ms", "p99 ms"]
    show("Punica's workloads", columns, rows, path)


def _row(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{found['tokens_per_s']:.0f}",
        f"{found['mean_adapters_of_a_forward']:.1f}",
        f"{found['first_token_s']['p50']:.1f}",
        f"{found['between_tokens_ms']['p50']:.1f}",
        f"{found['between_tokens_ms']['p99']:.1f}",
    ]


def measure(llama: Llama, workload: Workload, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures one popularity after another.

    Yields:
        A cell's name, and its throughput, its latencies, and how mixed its batches were.
    """
    allow_compiling()
    base = llama.build(device)
    kind = "liger" if workload.liger and with_liger(base, "engine-workloads") else "plain"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    adapters = workload.adapters or workload.requests
    contents = min(workload.contents, adapters)
    bank = RandomBank(base, adapters, rank=llama.rank, dtype=llama.dtype, contents=contents)
    model = MultiLoraModel(base, bank, adapter_memory=_adapter_memory(bank, workload.batch))
    bank.hold_in_host(model)
    cache = llama.cache_bytes(workload.batch, workload.tokens)
    with Engine(model, engine_config(workload.batch, cache, device, level=workload.level)) as engine:
        for count, popularity in enumerate(workload.popularities):
            asked = cut(_asked(workload, popularity), workload.longest)
            if not count:  # once beforehand, for what is compiled and captured on the way
                serve_trace(engine, cut(asked, 32)[: 2 * workload.batch], bank.names, llama.vocabulary)
            found = serve_trace(engine, asked, bank.names, llama.vocabulary)
            yield f"{popularity}, batch {workload.batch}, {kind}, {where}", found


def _asked(workload: Workload, popularity: Popularity) -> list[Asked]:
    rng = random.Random(workload.seed)
    adapters = adapters_of(workload.requests, popularity, rng)
    return trace([0.0] * workload.requests, adapters, punica_lengths, rng)


def _adapter_memory(bank: RandomBank, batch: int) -> int:
    """Room for the adapters of two batches, so that one can come while another runs."""
    return 2 * batch * max(entry.nbytes + 256 for entry in bank.values())
