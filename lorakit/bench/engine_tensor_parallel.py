"""engine-tensor-parallel: a decode step of a base that the GPUs of a host share.

Llama-2-70B's shape with Llama-3's vocabulary, which one GPU does not hold; random bfloat16 weights, rank 16 on all
linear layers, 32 rows, prompts of 128 tokens. A process a GPU, by transformers' tensor parallelism; no process ever has
the base whole. A cell of the result is a number of GPUs of a kind.

Two numbers, a step of 32 rows on two GPUs: on each, 70 GB of weights and 9 GB of 32 adapters are 16 and 2 ms at 4.3
TB/s; 160 sums over both GPUs, of 0.5 MB each, come on top.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed, multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorakit.bench.engine_step import Steps, times_of
from lorakit.bench.harness import save_cells, show, statistics_of
from lorakit.bench.llamas import LLAMA_70B, Llama, prompts
from lorakit.bench.random_bank import RandomBank
from lorakit.bench.served import engine_config, has_gpu, serve_rows
from lorakit.console import make_console
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel

_NAME = "engine-tensor-parallel"


class Shared(NamedTuple):
    """What is measured.

    Attributes:
        llama: the base.
        rows: of the batch, and adapters.
        steps: prompts and runs; its batches and variants are not looked at.
        cuda: whether each process has a GPU; else they share a CPU, to try the benchmark itself.
    """

    llama: Llama = Llama(LLAMA_70B)
    rows: int = 32
    steps: Steps = Steps()
    cuda: bool = True


def run(folder: Path) -> None:
    """Measures on all GPUs, prints and saves `engine_tensor_parallel.json`; says so where there are none, or one."""
    if not has_gpu(_NAME):
        return
    if torch.cuda.device_count() < 2:
        make_console().print(f"{_NAME}: left out, it measures several GPUs")
        return
    run_shared(folder, Shared(), torch.cuda.device_count())


def run_shared(folder: Path, shared: Shared, size: int) -> None:
    """The same for any base, with so many processes."""
    with tempfile.TemporaryDirectory() as meeting:
        multiprocessing.spawn(_process, args=(size, meeting, str(folder), shared), nprocs=size)


def _process(rank: int, size: int, meeting: str, folder: str, shared: Shared) -> None:
    """One of the processes; the first prints and saves."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    device = torch.device("cuda", rank) if shared.cuda else torch.device("cpu")
    if shared.cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if shared.cuda else "gloo",
        init_method=f"file://{meeting}/store",
        rank=rank,
        world_size=size,
        device_id=device if shared.cuda else None,
    )
    try:
        found = measure(shared, size, device)
        if rank == 0:
            _report(Path(folder), shared, size, found)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _report(folder: Path, shared: Shared, size: int, found: Mapping[str, Any]) -> None:
    where = torch.cuda.get_device_name() if shared.cuda else "cpu"
    setting = {**shared.llama.as_json(), "rows": shared.rows, **shared.steps._asdict()}
    path, cells = save_cells("engine_tensor_parallel", folder, f"{size} x {where}", setting, dict(found))
    rows = [
        [cell, *(f"{results[what]['step_ms']['median']:.2f}" for what in _mixes(shared.rows, []))]
        for cell, results in ((cell, content["results"]) for cell, content in cells.items())
    ]
    show("Decode step, medians in ms", ["", *_mixes(shared.rows, [])], rows, path)


def measure(shared: Shared, size: int, device: torch.device) -> dict[str, Any]:
    """Called in all processes; gives the first what was measured, and the others nothing."""
    llama, rows, steps = shared.llama, shared.rows, shared.steps
    base = random_base(llama, size, device)
    bank = RandomBank(base, rows, rank=llama.rank, dtype=llama.dtype, contents=rows)
    asked = prompts(rows, steps.prompt, llama.vocabulary)
    config = engine_config(rows, llama.cache_bytes(rows, steps.prompt + steps.long), device)
    found: dict[str, Any] = {}
    with Engine(MultiLoraModel(base, bank), config) as engine:
        if engine.leads:
            for what, names in _mixes(rows, bank.names).items():
                found[what] = {
                    "step_ms": statistics_of(times_of(partial(serve_rows, engine, asked, names), steps)),
                }
            found["adapter_bytes_of_a_process"] = engine.stats().device.nbytes
    return found


def _mixes(rows: int, names: list[str]) -> dict[str, list[str | None]]:
    return {"no adapters": [None] * rows, "one adapter": [*names[:1] * rows], "distinct adapters": [*names]}


def random_base(llama: Llama, size: int, device: torch.device) -> PreTrainedModel:
    """A base of random weights, of which each process makes its part alone."""
    from transformers.distributed import DistributedConfig

    config = LlamaConfig(**llama.shape)
    settings, _, manager = LlamaForCausalLM.prepare_distribute_model(DistributedConfig(tp_size=size))
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, attn_implementation=llama.attention, dtype=llama.dtype)
    model = LlamaForCausalLM.maybe_distribute_model(model, settings, manager)
    model.to_empty(device=device)
    # What no checkpoint has, and `to_empty` has emptied.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    torch.manual_seed(int(os.environ["RANK"]))
    with torch.no_grad():
        for parameter in model.parameters():
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            if parameter.dim() == 1:
                own.fill_(1)  # norms, the same everywhere
            else:
                own.normal_(0, 0.02)
    return model.eval()
