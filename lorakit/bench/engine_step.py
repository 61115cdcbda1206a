"""engine-step: a decode step of the engine on a GPU, with no adapters, one and as many as rows, beside transformers'.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers, prompts of 128 tokens, greedy; as many
adapters as rows also with top-p. A step's time is the difference of a long run's and a short run's, over the tokens
between: prefill, start-up and the first steps cancel. engine-step-8b and engine-step-13b are the same on the shapes of
Llama-3-8B, whose heads share keys and values, and of Llama-2-13B.

Two numbers, a step of 32 rows: 13.2 GB of weights, 4.5 GB of keys and values at 270 tokens, and 2.6 GB of 32 adapters;
at 3.0 TB/s 5.9 ms without adapters and 6.8 with.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from lorakit.adapters.bank import AdapterBank
from lorakit.bench.harness import show, statistics_of
from lorakit.bench.llamas import LLAMA_2_7B, LLAMA_2_13B, LLAMA_3_8B, Llama, blocks, prompts, with_liger
from lorakit.bench.plots import bars
from lorakit.bench.random_bank import RandomBank
from lorakit.bench.served import Serve, allow_compiling, engine_config, has_gpu, save_each, serve_rows, step_ms
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel

Variant = Literal["plain", "compiled", "liger"]

_SAMPLED = "distinct adapters, top-p 0.9"
"""All else is greedy. Logits of random weights are flat, so that most of the vocabulary has to be summed up."""


class Steps(NamedTuple):
    """What is measured.

    Attributes:
        batches: rows of a batch.
        prompt: tokens of each.
        short: tokens that the short run generates.
        long: tokens that the long run generates.
        variants: of the base; "plain", "compiled" (transformers' level 1) and "liger" (see `with_liger`; they stay, so
            it comes last).
        runs: of each.
    """

    batches: Sequence[int] = (1, 32)
    prompt: int = 128
    short: int = 16
    long: int = 144
    variants: Sequence[Variant] = ("plain", "compiled", "liger")
    runs: int = 3


def run(
    folder: Path, *, name: str = "engine-step", title: str = "Llama-2-7B", shape: Mapping[str, Any] = LLAMA_2_7B
) -> None:
    """Measures, prints and saves `engine_step.json`; says so and does nothing where there is no GPU.

    Args:
        folder: where to.
        name: the benchmark's; its file's with underscores.
        title: the shape's.
        shape: the base's.
    """
    if not has_gpu(name):
        return
    llama, steps = Llama(dict(shape)), Steps()
    states = measure(llama, steps, torch.device("cuda"), name=name)
    path, results = save_each(name.replace("-", "_"), folder, {**llama.as_json(), **steps._asdict()}, states)
    plot(results, path.with_suffix(".png"))
    rows = [
        [what, *(f"{found['step_ms'][key]:.2f}" for key in ("min", "median", "max"))] for what, found in results.items()
    ]
    show(f"Decode step, {title} shape", ["", "min ms", "median ms", "max ms"], rows, path)


run_8b = partial(run, name="engine-step-8b", title="Llama-3-8B", shape=LLAMA_3_8B)
run_13b = partial(run, name="engine-step-13b", title="Llama-2-13B", shape=LLAMA_2_13B)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each of what was measured."""
    medians = {name: found["step_ms"]["median"] for name, found in results.items()}
    labels = [f"{median:.2f} ms" for median in medians.values()]
    bars(path, medians, "decode step, ms (median)", labels=labels, theirs="transformers")


def measure(llama: Llama, steps: Steps, device: torch.device, *, name: str = "engine-step") -> Iterator[dict[str, Any]]:
    """Measures one after another.

    Yields:
        Name of what was measured until now → its step's statistics, in milliseconds.
    """
    allow_compiling()
    base = llama.build(device)
    most = max(steps.batches)
    bank = RandomBank(base, most, rank=llama.rank, dtype=llama.dtype, contents=most)
    found = {}
    for variant in steps.variants:
        if variant == "liger" and not with_liger(base, name):
            continue
        for batch in steps.batches:
            for what, times in _systems(base, bank, batch, int(variant == "compiled"), llama, steps):
                found[f"{what}, batch {batch}, {variant}"] = {"step_ms": statistics_of(times)}
                yield found


def _systems(
    base: PreTrainedModel, bank: AdapterBank, batch: int, level: int, llama: Llama, steps: Steps
) -> Iterator[tuple[str, list[float]]]:
    yield "transformers, no adapters", _transformers(base, batch, level, llama, steps)
    _free()
    names = bank.names[:batch]
    mixes: dict[str, Sequence[str | None]] = {"no adapters": [None] * batch, "one adapter": names[:1] * batch}
    if batch > 1:
        mixes |= {"distinct adapters": names, _SAMPLED: names}
    asked = prompts(batch, steps.prompt, llama.vocabulary)
    model = MultiLoraModel(base, bank)
    cache = llama.cache_bytes(batch, steps.prompt + steps.long)
    with Engine(model, engine_config(batch, cache, base.device, level=level)) as engine:
        for name, mix in mixes.items():
            sampling: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9} if name == _SAMPLED else {}
            yield f"lorakit, {name}", times_of(partial(serve_rows, engine, asked, mix, **sampling), steps)
    del model, engine
    _free()


def _transformers(base: PreTrainedModel, batch: int, level: int, llama: Llama, steps: Steps) -> list[float]:
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        default_compile_level=level,
        max_requests_per_batch=batch,
        num_blocks=blocks(batch, steps.prompt + steps.long),
        max_batch_tokens=8192,
        allow_block_sharing=False,
    )
    asked = prompts(batch, steps.prompt, llama.vocabulary)
    with base.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, timeout=5
    ) as manager:

        def serve(tokens: int) -> None:
            manager.add_requests(inputs=asked, max_new_tokens=tokens)
            done = 0
            while done < batch:
                result = manager.get_result(timeout=60)
                assert result is not None and result.error is None, result
                done += result.is_finished()

        return times_of(serve, steps)


def times_of(serve: Serve, steps: Steps) -> list[float]:
    """Milliseconds of a step, of each pair of runs, after some that are not counted."""
    for tokens in (steps.short, steps.long, steps.short):
        serve(tokens)
    return [step_ms(serve, steps.short, steps.long) for _ in range(steps.runs)]


def _free() -> None:
    """Gives back what the last engine had: two caches and a base of 13B are more than a GPU has."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
