"""engine-peft: the engine beside PEFT on a GPU, 32 requests for 32 adapters.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers, prompts of 128 tokens. PEFT serves them in
two ways: all in one batch, by `adapter_names` of `generate`, and one after another, by `set_adapter`. Both models have
the same weights, which lie on the GPU once, and PEFT's runs as users run it: transformers' `generate`, not compiled.

Rates of decoding: a step is the difference of a long run's and a short one's, over the tokens between. For the one that
switches, a whole request is measured too, with its prompt and its switch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from lorakit.bench.harness import show, statistics_of
from lorakit.bench.llamas import LINEARS, Llama, prompts, twin, with_liger
from lorakit.bench.plots import bars
from lorakit.bench.random_bank import RandomBank
from lorakit.bench.served import allow_compiling, engine_config, has_gpu, save_each, serve_rows, step_ms
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel

ENGINE, MIXED, SWITCHED = "lorakit, mixed batch", "PEFT, mixed batch", "PEFT, one request after another"


class Setting(NamedTuple):
    """What is measured.

    Attributes:
        adapters: and requests, and rows of a batch.
        prompt: tokens of each.
        short: tokens that the engine's short run generates.
        long: tokens that its long run generates.
        peft_short: the same of PEFT's, whose steps take seconds.
        peft_long: the same.
        switched: requests that PEFT is given one after another.
        answer: tokens of each of these.
        runs: of each.
        liger: with liger-kernel's kernels, if it is installed, for both.
    """

    adapters: int = 32
    prompt: int = 128
    short: int = 16
    long: int = 144
    peft_short: int = 1
    peft_long: int = 4
    switched: int = 2
    answer: int = 32
    runs: int = 2
    liger: bool = True


def run(folder: Path) -> None:
    """Measures, prints and saves `engine_peft.json`; says so and does nothing where there is no GPU."""
    if has_gpu("engine-peft"):
        run_setting(folder, Llama(), Setting(), torch.device("cuda"))


def run_setting(
    folder: Path, llama: Llama, setting: Setting, device: torch.device, *, seconds: float | None = None
) -> None:
    """Measures, prints and saves one setting; no part begins after so many seconds."""
    states = measure(llama, setting, device)
    path, results = save_each("engine_peft", folder, {**llama.as_json(), **setting._asdict()}, states, seconds=seconds)
    plot(results, path.with_suffix(".png"))
    rows = [
        [
            name,
            f"{found['step_ms']['median']:.2f}",
            f"{found['tokens_per_s']['median']:.1f}",
            f"{found['engine_is_times_faster']['median']:.1f}",
        ]
        for name, found in results.items()
    ]
    show("Decoding, Llama-2-7B shape: medians", ["", "step ms", "tokens/s", "the engine's of it"], rows, path)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each system."""
    medians = {name: found["tokens_per_s"]["median"] for name, found in results.items()}
    labels = [f"{rate:.0f}" for rate in medians.values()]
    bars(path, medians, "tokens a second (median)", labels=labels, theirs="PEFT")


def measure(llama: Llama, setting: Setting, device: torch.device) -> Iterator[dict[str, Any]]:
    """Takes the systems in turn, round by round.

    Yields:
        System → statistics over the rounds until now; ratios are the engine's tokens a second to its own, in one round.
    """
    allow_compiling()
    base = llama.build(device)
    if setting.liger:
        with_liger(base, "engine-peft")
    bank = RandomBank(base, setting.adapters, rank=llama.rank, dtype=llama.dtype, contents=setting.adapters)
    names = bank.names
    asked = prompts(setting.adapters, setting.prompt, llama.vocabulary)
    other = twin(base)
    other.set_attn_implementation("sdpa")  # as users have it; not every package of FlashAttention serves `generate`
    peft = with_adapters(other, names, llama.rank)
    rates: dict[str, list[dict[str, float]]] = {ENGINE: [], SWITCHED: [], MIXED: []}
    cache = llama.cache_bytes(setting.adapters, setting.prompt + setting.long)
    with Engine(MultiLoraModel(base, bank), engine_config(setting.adapters, cache, device)) as engine:
        serve = partial(serve_rows, engine, asked, names)
        for tokens in (setting.short, setting.long, setting.short):
            serve(tokens)
        _switched(peft, asked[:1], names, 2)
        mixed = partial(_generate, peft, asked, adapter_names=names)
        mixed(1)
        for _ in range(setting.runs):
            step = step_ms(serve, setting.short, setting.long)
            rates[ENGINE].append(_rates(step, setting.adapters))
            rates[SWITCHED].append(_switching(peft, asked[: setting.switched], names, setting))
            step = step_ms(mixed, setting.peft_short, setting.peft_long)
            rates[MIXED].append(_rates(step, setting.adapters))
            yield {name: _together(found, rates[ENGINE]) for name, found in rates.items()}


def with_adapters(base: PreTrainedModel, names: Sequence[str], rank: int) -> PeftModel:
    """PEFT's model with random adapters, in the base's dtype, drawn where the base is.

    Only the first comes by PEFT's own `add_adapter`, which goes through all modules for each: minutes for 32 of them.
    The others are what it would have made.
    """
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(LINEARS), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.device(base.device):
        model = get_peft_model(base, config, adapter_name=names[0], autocast_adapter_dtype=False)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for name in names[1:]:
            model.peft_config[name] = config
            for layer in layers:
                layer.update_layer(name, rank, lora_alpha=rank, config=config)
    model.generation_config.eos_token_id = None  # all generate as many tokens
    return model.eval()


def _switching(
    peft: PeftModel, asked: Sequence[Sequence[int]], names: Sequence[str], setting: Setting
) -> dict[str, float]:
    """Rates of requests that come one after another, each for another adapter."""
    steps = [
        step_ms(partial(_switched, peft, [prompt], [name]), 1, setting.answer)
        for prompt, name in zip(asked, names, strict=False)
    ]
    started = time.perf_counter()
    _switched(peft, asked, names, setting.answer)
    seconds = time.perf_counter() - started
    return {**_rates(sum(steps) / len(steps), 1), "whole_requests_tokens_per_s": len(asked) * setting.answer / seconds}


def _switched(peft: PeftModel, asked: Sequence[Sequence[int]], names: Sequence[str], tokens: int) -> None:
    for prompt, name in zip(asked, names, strict=False):
        peft.set_adapter(name)
        _generate(peft, [prompt], tokens)


@torch.inference_mode()
def _generate(peft: PeftModel, asked: Sequence[Sequence[int]], tokens: int, **options: Any) -> torch.Tensor:
    ids = torch.tensor(asked, device=peft.device)
    found = peft.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    assert found.shape == (len(ids), ids.shape[1] + tokens), "none ends earlier"
    return found.cpu()  # waits for the GPU


def _rates(step: float, rows: int) -> dict[str, float]:
    return {"step_ms": step, "tokens_per_s": 1e3 * rows / step}


def _together(found: Sequence[dict[str, float]], engine: Sequence[dict[str, float]]) -> dict[str, Any]:
    ratios = [ours["tokens_per_s"] / one["tokens_per_s"] for one, ours in zip(found, engine, strict=True)]
    return {
        **{key: statistics_of([one[key] for one in found]) for key in found[0]},
        "engine_is_times_faster": statistics_of(ratios),
    }
