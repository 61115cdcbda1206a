"""Several processes that are one model together: gloo on the CPU, none left behind."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

LONGEST = 300.0
"""Seconds after which processes have hung."""


def together(function: Callable[..., Any], *args: Any, size: int = 2, timeout: float = LONGEST) -> list[Any]:
    """Calls a function in so many fresh processes of one group.

    Args:
        function: at the top of its module; what it returns `torch.save` can write.
        *args: its arguments.
        size: the number of processes; each finds its own by `torch.distributed.get_rank`.
        timeout: seconds that all of them have.

    Returns:
        What it returned in each, by rank.

    Raises:
        AssertionError: one has failed, with its traceback, or they have hung.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(Path(folder), rank, size, timeout, function, args), daemon=True)
            for rank in range(size)
        ]
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # they share a CPU, also where there is a GPU
            for process in processes:
                process.start()
        try:
            end = time.monotonic() + timeout
            while any(process.is_alive() for process in processes) and time.monotonic() < end:
                # One that has failed leaves the others waiting.
                if any(process.exitcode for process in processes):
                    break
                time.sleep(0.02)
            errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
            assert not errors, "\n".join(errors)
            codes = [process.exitcode for process in processes]
            assert codes == [0] * size, f"exit codes {codes} after {timeout} s; None has hung"
            return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def shared(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A base that was saved, of which each process has its part."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=distributed.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _run(folder: Path, rank: int, size: int, timeout: float, function: Callable[..., Any], args: tuple[Any]) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        torch.save(function(*args), folder / f"result-{rank}")
    except BaseException:
        (folder / f"error-{rank}").write_text(f"process {rank}:\n{traceback.format_exc()}")
        raise
    # Not before all are done: one that leaves ends the others' connections.
    distributed.barrier()
    distributed.destroy_process_group()
