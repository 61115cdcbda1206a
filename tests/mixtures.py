"""Tiny random mixtures of experts, and PEFT adapters on their parameters."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from architectures import VOCAB, Architecture, adapt
from peft import PeftModel
from transformers import PreTrainedModel

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXTURES = {
    "qwen3-moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_SIZES, "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 5}
        | {"norm_topk_prob": True},
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM", "MixtralConfig", {**_SIZES, "intermediate_size": 40, "num_local_experts": 4}
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_SIZES, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 6, "sliding_window": 4},
    ),
}
_DEEP = {**_SIZES, "intermediate_size": 48, "moe_intermediate_size": 24}
FURTHER = {
    "deepseek-v3": Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_DEEP, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "ernie4.5-moe": Architecture(
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", {**_DEEP, "moe_num_experts": 4, "moe_k": 2}
    ),
    "glm4-moe": Architecture(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_DEEP, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "granitemoe": Architecture(
        "GraniteMoeForCausalLM", "GraniteMoeConfig", {**_SIZES, "intermediate_size": 24, "num_local_experts": 4}
    ),
    "olmoe": Architecture("OlmoeForCausalLM", "OlmoeConfig", {**_SIZES, "intermediate_size": 24, "num_experts": 4}),
    "qwen2-moe": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_DEEP, "shared_expert_intermediate_size": 24, "num_experts": 4},
    ),
}
"""Bases that have the same interface, each tested once."""
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
"""Options of LoraConfig: both parameters of every layer's experts."""


@cache
def mixture_of(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny base; not to be changed."""
    architecture = MIXTURES[name]
    return Architecture(architecture.model, architecture.config, {**architecture.options, **changes}).build()


def tenant_of(name: str, seed: int = 0, base: PreTrainedModel | None = None, **options: Any) -> PeftModel:
    """An adapter on a copy of the base, on its experts unless the options say otherwise."""
    return adapt(copy.deepcopy(base or mixture_of(name)), seed, copied=False, **{**EXPERTS, **options})


def one_row(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row of a batch, as a batch of its own."""
    return {key: tensor[row : row + 1] for key, tensor in inputs.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The error of a, relative to b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def in_double(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """A copy in fp64, each expert computed by itself: grouped products know no fp64."""
    copied = copy.deepcopy(model).double()
    base = copied.get_base_model() if isinstance(copied, PeftModel) else copied
    base.set_experts_implementation("eager")
    return copied
