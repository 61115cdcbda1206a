"""Exporting adapters of a 7B Llama beside `cp -r` of the same folders: throughput, and time an adapter.

A thousand rank-16 adapters in float32 are 160 GB. So what is measured is fewer of them, several times, beside a copy in
each round; a hundred in bfloat16 from the disk; and 10, 50 and 200 of rank 2, which show whether an adapter's time
grows with their number.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.adapters.export import export
from lorakit.adapters.peft_reader import CONFIG, PREFIX, SAFETENSORS
from lorakit.bench.harness import save, show, statistics_of
from lorakit.console import bar

LAYERS, HIDDEN, INTERMEDIATE = 32, 4096, 11008
MODULES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (HIDDEN, INTERMEDIATE) for name in ("gate", "up")},
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
RANK, ROUNDS = 16, 5
SERIES = {"float32": 6, "bfloat16": 12}
"""dtype → adapters: 1 GB each."""
STATES = ("in the page cache", "on the disk")
COUNTS, COUNTS_RANK = (10, 50, 200), 2
MANY, MANY_ROUNDS = 100, 2
"""Adapters, 8 GB, that with the bank do not fit the page cache of a small machine."""


def run(folder: Path) -> None:
    """Measures, prints and saves `export.json`."""
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)
        )
    results: dict[str, Any] = {}
    rows = []
    for dtype, count in SERIES.items():
        with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
            sources = _sources(Path(place) / "sources", count, RANK, getattr(torch, dtype))
            results[dtype] = _rounds(sources, base)
        rows += _rows(dtype, results[dtype])
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
        sources = _sources(Path(place) / "sources", MANY, RANK, torch.bfloat16)
        results["many"] = _rounds(sources, base, states=STATES[1:], rounds=MANY_ROUNDS)
    rows += _rows(f"{MANY} in bfloat16", results["many"])
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
        sources = _sources(Path(place) / "sources", max(COUNTS), COUNTS_RANK, torch.bfloat16)
        results["by_number"] = _by_number(sources, base)
    setting = {"layers": LAYERS, "modules": MODULES, "rank": RANK, "rounds": ROUNDS, "rank_by_number": COUNTS_RANK}
    path = save("export", folder, setting, results)
    rows += [
        [f"{count} of rank {COUNTS_RANK}", f"{found['export_GB_per_s']:.2f}", f"{found['cp_GB_per_s']:.2f}", ""]
        for count, found in results["by_number"]["adapters"].items()
    ]
    show("Exporting adapters of a 7B Llama", ["", "export GB/s", "cp GB/s", "median ratio"], rows, path)


def _rows(what: str, found: dict[str, Any]) -> list[list[str]]:
    names = ("export_GB_per_s", "cp_GB_per_s", "ratio")
    return [
        [f"{what}, {state}", *(f"{numbers[name]['median']:.2f}" for name in names)]
        for state, numbers in found["states"].items()
    ]


def _sources(folder: Path, count: int, rank: int, dtype: torch.dtype) -> list[Path]:
    """Checkpoints as PEFT saves them, each of other random weights."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[name.split(".")[1] for name in MODULES])
    config.task_type = "CAUSAL_LM"
    made = []
    with bar(f"{count} checkpoints", count) as step:
        for number in range(count):
            made.append(folder / f"tenant-{number:04d}")
            config.save_pretrained(str(made[-1]))
            generator = torch.Generator().manual_seed(number)
            tensors = {}
            for layer in range(LAYERS):
                for name, (wide, out) in MODULES.items():
                    key = f"{PREFIX}model.layers.{layer}.{name}"
                    tensors[f"{key}.lora_A.weight"] = torch.randn(rank, wide, generator=generator).to(dtype)
                    tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
            save_file(tensors, made[-1] / SAFETENSORS)
            step()
    os.sync()
    return made


def _rounds(
    sources: list[Path], base: LlamaForCausalLM, *, states: Iterable[str] = STATES, rounds: int = ROUNDS
) -> dict[str, Any]:
    nbytes = _nbytes(sources)
    by_state = {}
    for state in states:
        found: dict[str, list[float]] = {"export": [], "cp": [], "export_cpu": [], "cp_cpu": []}
        with bar(f"sources {state}", rounds) as step:
            for _ in range(rounds):
                for name, action in (("export", lambda to: export(sources, to, base_model=base)), ("cp", None)):
                    seconds, processor = _timed(sources, state, action)
                    found[name].append(seconds)
                    found[f"{name}_cpu"].append(processor)
                step()
        by_state[state] = {
            "load_average": os.getloadavg()[0],
            "export_GB_per_s": statistics_of([nbytes / seconds / 1e9 for seconds in found["export"]]),
            "cp_GB_per_s": statistics_of([nbytes / seconds / 1e9 for seconds in found["cp"]]),
            # Round by round: what slows the machine for a moment slows both.
            "ratio": statistics_of([cp / ours for ours, cp in zip(found["export"], found["cp"], strict=True)]),
            "export_s_per_adapter": statistics_of([seconds / len(sources) for seconds in found["export"]]),
            "export_processor_s_per_GB": statistics_of([seconds / nbytes * 1e9 for seconds in found["export_cpu"]]),
            "cp_processor_s_per_GB": statistics_of([seconds / nbytes * 1e9 for seconds in found["cp_cpu"]]),
        }
    return {"adapters": len(sources), "nbytes": nbytes, "states": by_state}


def _by_number(sources: list[Path], base: LlamaForCausalLM) -> dict[str, Any]:
    found = {}
    for count in COUNTS:
        some = sources[:count]
        seconds, processor = _timed(some, STATES[0], partial(export, some, base_model=base))
        copied, _ = _timed(some, STATES[0], None)
        found[str(count)] = {
            "export_GB_per_s": _nbytes(some) / seconds / 1e9,
            "cp_GB_per_s": _nbytes(some) / copied / 1e9,
            "export_ms_per_adapter": seconds / count * 1e3,
            "export_processor_ms_per_adapter": processor / count * 1e3,
        }
    return {"nbytes_per_adapter": _nbytes(sources[:1]), "adapters": found}


def _timed(sources: list[Path], state: str, action: Callable[[Path], object] | None) -> tuple[float, float]:
    """Seconds, and seconds of processors, of an export or (None) of a copy, into a fresh folder beside the sources.

    Until the bytes are on the disk: a bank is there when they are, and the copies are synced too.
    """
    os.sync()
    for file in _files(sources):
        with open(file, "rb", buffering=0) as opened:
            if state == "on the disk":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(1 << 24):
                    pass
    target = sources[0].parent.parent / "target"
    before, started = os.times(), time.perf_counter()
    if action is None:
        target.mkdir()
        subprocess.run(["cp", "-r", *map(str, sources), str(target)], check=True)
        for file in _files(target.iterdir()):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    else:
        action(target)
    seconds = time.perf_counter() - started
    processor = sum(os.times()[:4]) - sum(before[:4])
    shutil.rmtree(target)
    return seconds, processor


def _files(folders: Iterable[Path]) -> list[Path]:
    return [folder / name for folder in folders for name in (SAFETENSORS, CONFIG)]


def _nbytes(sources: list[Path]) -> int:
    return sum(file.stat().st_size for file in _files(sources))
