"""engine-step: a decode step of the engine on a GPU, with no adapters, one and as many as rows, beside transformers'.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers, prompts of 128 tokens. A step's time is the
difference of a long run's and a short run's, over the tokens between: prefill, start-up and the first steps cancel.

Two numbers, a step of 32 rows: 13.2 GB of weights, 4.5 GB of keys and values at 270 tokens, and 2.6 GB of 32 adapters;
at 3.0 TB/s 5.9 ms without adapters and 6.8 with.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from lorakit.adapters import fingerprint
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.bench.harness import save, show, statistics_of
from lorakit.bench.plots import bars
from lorakit.console import make_console
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel

Variant = Literal["plain", "compiled", "liger"]


class Setting(NamedTuple):
    """What is measured.

    Attributes:
        shape: of the Llama, as `LlamaConfig` takes it.
        dtype: of its weights, and of the adapters'.
        attention: transformers' implementation.
        rank: of the adapters.
        batches: rows of a batch.
        prompt: tokens of each.
        short: tokens that the short run generates.
        long: tokens that the long run generates.
        variants: of the base; "plain", "compiled" (transformers' level 1) and "liger" (the kernels of liger-kernel in
            the place of norms, rotary embeddings and activations; they stay, so it comes last).
        runs: of each.
    """

    shape: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    attention: str = "flash_attention_3"
    rank: int = 16
    batches: Sequence[int] = (1, 32)
    prompt: int = 128
    short: int = 16
    long: int = 144
    variants: Sequence[Variant] = ("plain", "compiled", "liger")
    runs: int = 3

    def as_json(self) -> dict[str, Any]:
        """What a result is saved with."""
        return {**self._asdict(), "dtype": str(self.dtype)}


LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Serve = Callable[[int], None]
"""Generates so many tokens in every row."""


def run(folder: Path) -> None:
    """Measures, prints and saves `engine_step.json`; says so and does nothing where there is no GPU."""
    if not torch.cuda.is_available():
        make_console().print("engine-step: left out, it measures a GPU")
        return
    setting = Setting(LLAMA_2_7B)
    results = measure(setting, torch.device("cuda"))
    path = save("engine_step", folder, setting.as_json(), results)
    plot(results, path.with_suffix(".png"))
    rows = [
        [name, *(f"{found['step_ms'][key]:.2f}" for key in ("min", "median", "max"))] for name, found in results.items()
    ]
    show("Decode step, Llama-2-7B shape", ["", "min ms", "median ms", "max ms"], rows, path)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each of what was measured."""
    medians = {name: found["step_ms"]["median"] for name, found in results.items()}
    labels = [f"{median:.2f} ms" for median in medians.values()]
    bars(path, medians, "decode step, ms (median)", labels=labels, theirs="transformers")


def measure(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Name of what was measured → its step's statistics, in milliseconds."""
    # A layer of a model is an entry: the default of 8 leaves most layers out.
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    base = base_of(setting, device)
    most = max(setting.batches)
    found = {}
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
        bank = random_bank(base, Path(place) / "bank", most, setting)
        for variant in setting.variants:
            if variant == "liger" and not _with_liger(base):
                make_console().print("engine-step: without liger-kernel, which is not installed")
                continue
            for batch in setting.batches:
                for name, steps in _systems(base, bank, batch, int(variant == "compiled"), setting):
                    found[f"{name}, batch {batch}, {variant}"] = {"step_ms": statistics_of(steps)}
    return found


def _with_liger(base: PreTrainedModel) -> bool:
    """Puts liger-kernel's into a Llama, if it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=base)
    return True


def base_of(setting: Setting, device: torch.device) -> PreTrainedModel:
    """A base of random weights."""
    with torch.device(device):
        return LlamaForCausalLM._from_config(
            LlamaConfig(**setting.shape), attn_implementation=setting.attention, dtype=setting.dtype
        ).eval()


def _systems(
    base: PreTrainedModel, bank: AdapterBank, batch: int, level: int, setting: Setting
) -> list[tuple[str, list[float]]]:
    found = [("transformers, no adapters", _transformers(base, batch, level, setting))]
    names = bank.names[:batch]
    mixes: dict[str, Sequence[str | None]] = {"no adapters": [None] * batch, "one adapter": names[:1] * batch}
    if batch > 1:
        mixes["distinct adapters"] = names
    model = MultiLoraModel(base, bank)
    config = EngineConfig(
        max_requests=batch,
        prefix_cache=False,
        cuda_graphs=None,
        compile_level=level,
        cache_memory=_cache(setting, batch),
    )
    with Engine(model, config) as engine:
        for name, mix in mixes.items():
            serve = partial(_lorakit, engine, _prompts(batch, setting), mix)
            found.append((f"lorakit, {name}", _steps(serve, setting)))
    return found


def _lorakit(engine: Engine, prompts: Sequence[Sequence[int]], mix: Sequence[str | None], tokens: int) -> None:
    engine.generate(prompts, mix, max_new_tokens=tokens, ignore_eos=True, progress=False)


def _transformers(base: PreTrainedModel, batch: int, level: int, setting: Setting) -> list[float]:
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        default_compile_level=level,
        max_requests_per_batch=batch,
        num_blocks=4 * batch,
        max_batch_tokens=8192,
        allow_block_sharing=False,
    )
    with base.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, timeout=5
    ) as manager:

        def serve(tokens: int) -> None:
            manager.add_requests(inputs=_prompts(batch, setting), max_new_tokens=tokens)
            done = 0
            while done < batch:
                result = manager.get_result(timeout=60)
                assert result is not None and result.error is None, result
                done += result.is_finished()

        return _steps(serve, setting)


def _steps(serve: Serve, setting: Setting) -> list[float]:
    """Milliseconds of a step, of each pair of runs."""
    for tokens in (setting.short, setting.long, setting.short):
        serve(tokens)
    found = []
    for _ in range(setting.runs):
        seconds = [_timed(serve, tokens) for tokens in (setting.short, setting.long)]
        found.append((seconds[1] - seconds[0]) / (setting.long - setting.short) * 1e3)
    return found


def _timed(serve: Serve, tokens: int) -> float:
    started = time.perf_counter()
    serve(tokens)
    return time.perf_counter() - started


def _prompts(batch: int, setting: Setting) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    most = setting.shape["vocab_size"] - 1
    return torch.randint(5, most, (batch, setting.prompt), generator=generator).tolist()


def _cache(setting: Setting, batch: int) -> int:
    """Bytes of the key-value cache: some blocks of 256 tokens for each row."""
    heads = setting.shape["num_key_value_heads"] * setting.shape["hidden_size"] // setting.shape["num_attention_heads"]
    token = 2 * heads * setting.shape["num_hidden_layers"] * setting.dtype.itemsize
    return 4 * batch * 256 * token


def random_bank(base: PreTrainedModel, folder: Path, adapters: int, setting: Setting) -> AdapterBank:
    """Adapters of random weights on all linear layers."""
    facts = BaseModel.of(base)

    def form(seed: int) -> AdapterForm:
        generator = torch.Generator(base.device).manual_seed(seed)

        def weights(*shape: int) -> torch.Tensor:
            drawn = torch.randn(shape, generator=generator, device=base.device, dtype=setting.dtype)
            return drawn.mul_(0.02).cpu()

        modules = {
            path: ModuleForm(
                "linear",
                module.in_features,
                module.out_features,
                weights(setting.rank, module.in_features),
                weights(module.out_features, setting.rank),
            )
            for path, module in base.named_modules()
            if path.endswith(_LINEARS) and isinstance(module, torch.nn.Linear)
        }
        return AdapterForm("lora", modules, {"peft_type": "LORA"})

    items = [(f"tenant-{seed:04d}", partial(form, seed), "random") for seed in range(adapters)]
    return AdapterBank.write(folder, items, base_id="llama", fingerprint=fingerprint.fingerprint(facts))
