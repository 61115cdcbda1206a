"""A tiny model with adapters of several methods, requests of any mix, and what each should give alone."""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from functools import cache
from typing import Any, NamedTuple

import torch
from architectures import ARCHITECTURES, METHODS, VOCAB, adapt
from mixtures import MIXTURES
from transformers import PreTrainedModel

from lorakit import Engine, MultiLoraModel
from lorakit.engine.config import EngineConfig

ALORA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
INVOCATION = [5, 6]
PROMPT = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22)
SMALL = EngineConfig(max_requests=6, max_batch_tokens=24, page_size=4, stop_timeout=10.0)


def config(**changes: Any) -> EngineConfig:
    """`SMALL`, with some settings changed."""
    return dataclasses.replace(SMALL, **changes)


class Asked(NamedTuple):
    """One request."""

    prompt: tuple[int, ...]
    adapter: str | None
    tokens: int


def family(name: str = "llama"):
    """A base, and PEFT models of it by the adapter's name, the same at every call."""
    return _family(name)


@cache
def _family(name: str):
    architecture = {**ARCHITECTURES, **MIXTURES}[name]
    base = architecture.build()
    methods = ["lora", "rslora", "dora", "embeddings"] if name == "llama" else ["lora", "rslora"]
    tenants = {method: adapt(base, seed, **METHODS[method](architecture)) for seed, method in enumerate(methods)}
    if name == "llama":
        tenants["alora"] = adapt(base, 9, alora_invocation_tokens=INVOCATION, **ALORA)
    return base, tenants


def double(name: str = "llama") -> PreTrainedModel:
    """A copy of the base in float64, by which no two ways of adding up differ in a greedy choice."""
    base = copy.deepcopy(family(name)[0])
    # torch's grouped products know no float64.
    return base if name in MIXTURES else base.double()


def model_of(name: str = "llama", **options: Any) -> MultiLoraModel:
    """A model of its own that serves the family's adapters."""
    model = MultiLoraModel(double(name), **options)
    tenants = family(name)[1]
    for tenant, adapted in tenants.items():
        model.load_adapter(tenant, adapted)
    return model


def requests(count: int, adapters: list[str | None], *, seed: int = 0, longest: int = 30) -> list[Asked]:
    """Random ones; some prompts invoke, some share their beginning."""
    rng = random.Random(seed)
    common = [rng.randrange(7, VOCAB) for _ in range(longest)]
    found = []
    for _ in range(count):
        length = rng.randint(1, longest)
        prompt = [rng.randrange(7, VOCAB) for _ in range(length)]
        if rng.random() < 0.4:
            prompt[: length // 2] = common[: length // 2]
        if rng.random() < 0.4 and length > 3:
            place = rng.randrange(length - 2)
            prompt[place : place + 2] = INVOCATION
        found.append(Asked(tuple(prompt), rng.choice(adapters), rng.randint(1, 12)))
    return found


def alone(model: MultiLoraModel, asked: Asked) -> tuple[int, ...]:
    """What a request gives in a batch of its own, by `generate`."""
    ids = torch.tensor([asked.prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        adapter_ids=[asked.adapter],
        max_new_tokens=asked.tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(out[0, len(asked.prompt) :].tolist())


def served(engine: Engine, asked: list[Asked], **settings: Any) -> list[tuple[int, ...]]:
    """What an engine gives, all of them submitted at once."""
    handles = [engine.submit(one.prompt, one.adapter, max_new_tokens=one.tokens, **settings) for one in asked]
    return [handle.result(60).token_ids for handle in handles]


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_p": 0.8, "seed": 1},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
]
"""In which tokens are drawn."""


def drawn(engine: Engine) -> list[tuple[Any, ...]]:
    """Tokens, and the most likely ones, that an engine gives of the base, drawn in all ways."""
    handles = [
        engine.submit(one.prompt, max_new_tokens=one.tokens, **WAYS[place % len(WAYS)])
        for place, one in enumerate(requests(25, [None]))
    ]
    found = [handle.result(60) for handle in handles]
    return [(one.token_ids, [[top.id for top in place] for place in one.top_logprobs or ()]) for one in found]


def at_rest(engine: Engine) -> None:
    """Nothing is held any more, by nobody."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        stats = engine.stats()
        busy = engine._batching.batch_processor.scheduler
        if not (stats.open or stats.waiting or busy.active_requests or busy.waiting_requests or engine.model.pool.held):
            break
        time.sleep(0.01)
    stats = engine.stats()
    assert (stats.open, stats.waiting, stats.running, engine.model.pool.held) == (0, {}, {}, False)
    assert stats.cache_free == 1.0
    assert not busy.waiting_requests and not busy.cache.owners
    assert not engine._batching._chooser._taken and not engine._batching._chooser._waiting


def wait_for(engine: Engine, state: str) -> None:
    """Waits until the engine is so."""
    end = time.monotonic() + 20
    while engine.state != state and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.state == state
