"""Eight tenants on the CPU: the engine, and PEFT one request, one tenant and one mixed batch at a time.

The small base model of the quickstart in fp32, adapters of rank 16 on all its linear layers, greedy. A step of the base
reads 540 MB whatever the batch, so what is gained is what shares a step: PEFT that switches adapters shares it among
the requests of one tenant, the engine among all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorakit.bench.harness import save, show, statistics_of
from lorakit.console import bar
from lorakit.embedded import model_path
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel

TENANTS, EACH, RANK, NEW_TOKENS, ROUNDS, THREADS = 8, 1, 16, 16, 3, 2
PROMPTS = (16, 48)
"""Tokens of a prompt, from and to."""
SYSTEM = "lorakit's engine"


class _Asked(NamedTuple):
    tenant: str
    prompt: list[int]


_Answers = list[tuple[int, ...]]


def run(folder: Path) -> None:
    """Measures, prints and saves `cpu_engine.json`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        seconds, equal = _measure()
    finally:
        torch.set_num_threads(threads)
    tokens = TENANTS * EACH * NEW_TOKENS
    results = {
        name: {
            "tokens_per_s": statistics_of([tokens / value for value in values]),
            "engine_is_times_faster": statistics_of(_ratios(values, seconds[SYSTEM])),
            "requests_with_the_engines_tokens": equal[name],
        }
        for name, values in seconds.items()
    }
    setting = {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "threads": THREADS,
        "tenants": TENANTS,
        "requests_a_tenant": EACH,
        "rank": RANK,
        "prompt_tokens": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "order": "tenants in turn, all requests there from the beginning",
    }
    path = save("cpu_engine", folder, setting, results)
    rows = [
        [name, f"{tokens / median(values):.1f}", f"{median(_ratios(values, seconds[SYSTEM])):.1f}"]
        for name, values in seconds.items()
    ]
    title = f"{TENANTS} tenants, {TENANTS * EACH} requests, {THREADS} threads"
    show(title, ["system", "tokens/s", "the engine is × faster"], rows, path)


def _ratios(values: Sequence[float], engine: Sequence[float]) -> list[float]:
    """Round by round: what slows the machine for a while slows all of a round."""
    return [value / mine for value, mine in zip(values, engine, strict=True)]


def _measure() -> tuple[dict[str, list[float]], dict[str, int]]:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    # All generate as many tokens.
    base.generation_config.eos_token_id = None
    names = [f"tenant-{i}" for i in range(TENANTS)]
    rng = random.Random(0)
    asked = [
        _Asked(name, [rng.randrange(100, 40000) for _ in range(rng.randint(*PROMPTS))])
        for _ in range(EACH)
        for name in names
    ]
    peft = _with_adapters(AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32), names)
    peft.generation_config.eos_token_id = None
    model = MultiLoraModel(base)
    for name in names:
        peft.set_adapter(name)
        model.load_adapter(name, peft)
    systems: dict[str, Callable[[Sequence[_Asked]], _Answers]] = {
        SYSTEM: lambda asked: _engine(model, asked),
        "PEFT, one request at a time": lambda asked: [_peft(peft, [one])[0] for one in asked],
        "PEFT, one tenant at a time": lambda asked: _by_tenant(peft, asked),
        "PEFT, a mixed batch of all": lambda asked: _peft(peft, asked, mixed=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    equal: dict[str, int] = {}
    mine: _Answers = []
    with bar("cpu-engine", ROUNDS * len(systems)) as step:
        for _ in range(ROUNDS):
            for name, system in systems.items():
                system(asked[:2])
                started = time.perf_counter()
                answers = system(asked)
                seconds[name].append(time.perf_counter() - started)
                if name == SYSTEM:
                    mine = answers
                equal[name] = sum(one == other for one, other in zip(answers, mine, strict=True))
                step()
    return seconds, equal


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


def _engine(model: MultiLoraModel, asked: Sequence[_Asked]) -> _Answers:
    with Engine(model, EngineConfig(max_requests=TENANTS * EACH, prefix_cache=False)) as engine:
        found = engine.generate(
            [one.prompt for one in asked],
            [one.tenant for one in asked],
            max_new_tokens=NEW_TOKENS,
            progress=False,
        )
    return [one.token_ids for one in found]


def _by_tenant(peft: PeftModel, asked: Sequence[_Asked]) -> _Answers:
    answers: dict[int, tuple[int, ...]] = {}
    for tenant in dict.fromkeys(one.tenant for one in asked):
        places = [place for place, one in enumerate(asked) if one.tenant == tenant]
        answers |= dict(zip(places, _peft(peft, [asked[place] for place in places]), strict=True))
    return [answers[place] for place in range(len(asked))]


@torch.inference_mode()
def _peft(peft: PeftModel, asked: Sequence[_Asked], *, mixed: bool = False) -> _Answers:
    """A batch of one tenant, or (mixed) of many, padded on the left."""
    longest = max(len(one.prompt) for one in asked)
    ids = torch.zeros((len(asked), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(asked):
        ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
        mask[row, longest - len(one.prompt) :] = 1
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    if mixed:
        options["adapter_names"] = [one.tenant for one in asked]
    else:
        peft.set_adapter(asked[0].tenant)
    out = peft.generate(input_ids=ids, attention_mask=mask, **options)
    return [tuple(row[longest:].tolist()) for row in out]
