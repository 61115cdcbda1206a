"""Eight tenants on the CPU, a request each: the engine, and PEFT that serves one tenant at a time.

The small base model of the quickstart in fp32, adapters of rank 16 on all its linear layers, greedy. A decode step of

    one request     540 MB of the base, 20 MB of an adapter, 0.28 GFLOP
    eight requests  540 MB of the base, 156 MB of adapters, 2.2 GFLOP

so the engine, whose eight share a step, has 6.4 times less to read for each token; what BLAS makes of eight rows, and
the prompts, which are bound by operations, bring it down.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorakit.bench.harness import save, show, statistics_of
from lorakit.console import bar
from lorakit.embedded import model_path
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel

TENANTS, RANK, NEW_TOKENS, ROUNDS, THREADS = 8, 16, 48, 3, 2
PROMPTS = (16, 48)
"""Tokens of a prompt, from and to."""
SYSTEM, PEFT = "lorakit's engine", "PEFT, one tenant at a time"


class _Asked(NamedTuple):
    tenant: str
    prompt: list[int]


_Answers = list[tuple[int, ...]]
_System = Callable[[Sequence[_Asked], int], _Answers]


def run(folder: Path) -> None:
    """Measures, prints and saves `cpu_engine.json`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        seconds, equal = _measure()
    finally:
        torch.set_num_threads(threads)
    # Round by round: what slows the machine for a while slows all of a round.
    ratios = [peft / mine for peft, mine in zip(seconds[PEFT], seconds[SYSTEM], strict=True)]
    rates = {
        name: statistics_of([TENANTS * NEW_TOKENS / value for value in values]) for name, values in seconds.items()
    }
    results = {
        "tokens_per_s": rates,
        "engine_is_times_faster": statistics_of(ratios),
        "requests_with_equal_tokens": equal,
    }
    setting = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "threads": THREADS,
        "tenants": TENANTS,
        "requests": TENANTS,
        "rank": RANK,
        "prompt_tokens": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "order": "systems in turn, all requests there from the beginning",
    }
    path = save("cpu_engine", folder, setting, results)
    rows = [[name, *(f"{rate[key]:.1f}" for key in ("min", "median", "max"))] for name, rate in rates.items()]
    title = (
        f"{TENANTS} tenants, a request each, {THREADS} threads: tokens/s, the engine {median(ratios):.2f} times PEFT"
    )
    show(title, ["system", "min", "median", "max"], rows, path)


def _measure() -> tuple[dict[str, list[float]], int]:
    """Seconds of every round by system, and how many requests got the same tokens from both."""
    torch.manual_seed(0)
    names = [f"tenant-{i}" for i in range(TENANTS)]
    rng = random.Random(0)
    asked = [_Asked(name, [rng.randrange(100, 40000) for _ in range(rng.randint(*PROMPTS))]) for name in names]
    peft = _with_adapters(AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32), names)
    # All generate as many tokens.
    peft.generation_config.eos_token_id = None
    model = MultiLoraModel(AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval())
    for name in names:
        peft.set_adapter(name)
        model.load_adapter(name, peft)
    seconds: dict[str, list[float]] = {SYSTEM: [], PEFT: []}
    answers: dict[str, _Answers] = {}
    # The engine stands, as PEFT's model does.
    with Engine(model, EngineConfig(max_requests=TENANTS, prefix_cache=False)) as engine:
        systems: dict[str, _System] = {
            SYSTEM: lambda asked, tokens: _engine(engine, asked, tokens),
            PEFT: lambda asked, tokens: [_peft(peft, one, tokens) for one in asked],
        }
        for system in systems.values():
            system(asked, 2)
        with bar("cpu-engine", ROUNDS * len(systems)) as step:
            for _ in range(ROUNDS):
                for name, system in systems.items():
                    started = time.perf_counter()
                    answers[name] = system(asked, NEW_TOKENS)
                    seconds[name].append(time.perf_counter() - started)
                    step()
    assert all(len(answer) == NEW_TOKENS for found in answers.values() for answer in found), "none ends earlier"
    return seconds, sum(one == other for one, other in zip(answers[SYSTEM], answers[PEFT], strict=True))


def _with_adapters(base: PreTrainedModel, names: list[str]) -> PeftModel:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _engine(engine: Engine, asked: Sequence[_Asked], tokens: int) -> _Answers:
    found = engine.generate(
        [one.prompt for one in asked],
        [one.tenant for one in asked],
        max_new_tokens=tokens,
        ignore_eos=True,
        progress=False,
    )
    return [one.token_ids for one in found]


@torch.inference_mode()
def _peft(peft: PeftModel, one: _Asked, tokens: int) -> tuple[int, ...]:
    peft.set_adapter(one.tenant)
    ids = torch.tensor([one.prompt])
    out = peft.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tuple(out[0, len(one.prompt) :].tolist())
