"""A decode step on the CPU: the base alone, lorakit, and PEFT's mixed batch, in one process and interleaved.

Per step at batch 8 with 8 distinct adapters of rank 16, fp32 (hidden 512, 8 layers, intermediate 1376):

    bytes       base 166 MB (of it the head 66), adapters 40 MB: the floor is 1.24 × the base where memory binds
    operations  base 664 MFLOP, adapters 20 MFLOP
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.bench.harness import save, show, statistics_of
from lorakit.bench.plots import bars
from lorakit.console import bar
from lorakit.runtime.model import MultiLoraModel

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}
BATCH, RANK, PROMPT, STEPS, THREADS = 8, 16, 32, 60, 2


def run(folder: Path) -> None:
    """Measures, prints and saves `cpu_decode.json` and its plot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        seconds = _measure()
        results = _results(seconds)
        setting = {"shape": SHAPE, "dtype": "float32", "batch": BATCH, "adapters": BATCH, "rank": RANK}
        setting |= {"prompt_tokens": PROMPT, "steps": STEPS, "order": "interleaved, one step of each in turn"}
        path = save("cpu_decode", folder, setting, results)
    finally:
        torch.set_num_threads(threads)
    _plot(results, path.with_suffix(".png"))
    rows = [
        [name, *(f"{r['step_ms'][key]:.2f}" for key in ("min", "median", "max")), f"{r['ratio_to_base']['median']:.2f}"]
        for name, r in results.items()
    ]
    title = f"Decode step, batch {BATCH}, {BATCH} adapters of rank {RANK}, {THREADS} threads"
    show(title, ["system", "min ms", "median ms", "max ms", "median ratio to base"], rows, path)


def _measure() -> dict[str, list[float]]:
    """Seconds of each decode step, by system; step i of every system ran next to step i of the others."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    names = [f"tenant-{i}" for i in range(BATCH)]
    peft = _with_adapters(copy.deepcopy(base), names)
    # Two, because a model stacks its batch's factors when the mix of adapters changes: in `generate` that is once.
    mixed, single = MultiLoraModel(copy.deepcopy(base)), MultiLoraModel(copy.deepcopy(base))
    for name in names:
        peft.set_adapter(name)
        mixed.load_adapter(name, peft)
        single.load_adapter(name, peft)
    peft.eval()
    systems: dict[str, tuple[Any, dict[str, Any]]] = {
        "base": (base, {}),
        "lorakit, no adapters": (mixed, {}),
        "lorakit, one adapter": (single, {"adapter_ids": names[0]}),
        "lorakit, 8 adapters": (mixed, {"adapter_ids": names}),
        "PEFT, 8 adapters": (peft, {"adapter_names": names}),
    }
    ids = torch.randint(SHAPE["vocab_size"], (BATCH, PROMPT + STEPS))
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    with torch.inference_mode(), bar("cpu-decode", STEPS) as step:
        caches = {
            name: system(input_ids=ids[:, :PROMPT], use_cache=True, **options).past_key_values
            for name, (system, options) in systems.items()
        }
        for position in range(PROMPT, PROMPT + STEPS):
            token = ids[:, position : position + 1]
            for name, (system, options) in systems.items():
                started = time.perf_counter()
                system(input_ids=token, past_key_values=caches[name], use_cache=True, **options)
                seconds[name].append(time.perf_counter() - started)
            step()
    warm = STEPS // 10
    return {name: values[warm:] for name, values in seconds.items()}


def _with_adapters(base: LlamaForCausalLM, names: list[str]) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def _results(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        name: {
            "step_ms": statistics_of([value * 1e3 for value in values]),
            # Pair by pair: what slows the machine for a moment slows both of a pair.
            "ratio_to_base": statistics_of([a / b for a, b in zip(values, seconds["base"], strict=True)]),
        }
        for name, values in seconds.items()
    }


def _plot(results: Mapping[str, Any], path: Path) -> None:
    medians = {name: found["step_ms"]["median"] for name, found in results.items()}
    ratios = [found["ratio_to_base"]["median"] for found in results.values()]
    labels = [f"{median:.1f} ms, {ratio:.2f}×" for median, ratio in zip(medians.values(), ratios, strict=True)]
    bars(path, medians, "decode step, ms (median)", labels=labels, theirs="PEFT")
