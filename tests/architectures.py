"""Tiny random models of many architectures, and PEFT adapters on them with every parameter random."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

VOCAB = 101
_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model: its class, its config, and where adapters sit."""

    model: str
    config: str
    options: dict[str, Any]
    linear: str | list[str] = "all-linear"
    embeddings: list[str] = field(default_factory=lambda: ["embed_tokens", "lm_head"])
    generates: bool = True

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model, the same at every call, biases and norms random too."""
        config = getattr(transformers, self.config)(**self.options)
        generator = torch.Generator().manual_seed(0)
        model = getattr(transformers, self.model)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = torch.randn(parameter.shape, generator=generator)
                norm = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.1 * spread if norm else 0.2 * spread)
        return model.to(dtype)

    def inputs(self, rows: int, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
        """A batch of random ids; an encoder-decoder's with its decoder's."""
        generator = torch.Generator().manual_seed(seed)

        def ids(tokens: int) -> torch.Tensor:
            return torch.randint(3, VOCAB, (rows, tokens), generator=generator)

        inputs = {"input_ids": ids(length)}
        if self.options.get("is_encoder_decoder", self.config == "T5Config"):
            inputs["decoder_input_ids"] = ids(3)
        return inputs


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "attention_bias": True}),
    "llama-tied": Architecture("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**_DECODER, "head_dim": 8}),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_DECODER, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    ),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 4}),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
        linear=["c_attn", "c_proj", "c_fc"],
        embeddings=["wte", "lm_head"],
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": None},
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None},
        embeddings=["shared", "lm_head"],
    ),
    "bert": Architecture(
        "BertForSequenceClassification",
        "BertConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": VOCAB, "num_labels": 5},
        linear=["query", "key", "value", "dense", "classifier"],
        embeddings=["word_embeddings", "classifier"],
        generates=False,
    ),
}

# LoRA's forms: options of LoraConfig, made for one architecture.
FACTORS: dict[str, Callable[[Architecture], dict[str, Any]]] = {
    "lora": lambda a: {"target_modules": a.linear},
    "rslora": lambda a: {"target_modules": a.linear, "use_rslora": True, "r": 8},
    "rank_pattern": lambda a: {
        "target_modules": a.linear,
        "rank_pattern": {r".*[a-z]\.1\..*": 7, _first(a.linear): 3},
        "alpha_pattern": {r".*[a-z]\.0\..*": 5},
    },
    "lora_bias": lambda a: {"target_modules": a.linear, "lora_bias": True},
    "dora": lambda a: {"target_modules": a.linear, "use_dora": True},
    "embeddings": lambda a: {"target_modules": a.embeddings},
    "embeddings-dora": lambda a: {"target_modules": a.embeddings, "use_dora": True},
}
METHODS: dict[str, Callable[[Architecture], dict[str, Any]]] = {
    **FACTORS,
    "saved": lambda a: {"target_modules": a.linear, "modules_to_save": a.embeddings},
    "biases": lambda a: {"target_modules": a.linear, "bias": "all"},
}


def _first(targets: str | list[str]) -> str:
    return "q_proj" if isinstance(targets, str) else targets[0]


def adapt(base: PreTrainedModel, seed: int, *, copied: bool = True, **options: Any) -> PeftModel:
    """A PEFT model over the base, or a copy of it, every parameter of its adapter random."""
    defaults = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base) if copied else base, LoraConfig(**(defaults | options))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.4 * torch.rand(parameter.shape, generator=generator).to(parameter.device))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:  # a saved module, or a bias
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def first_tensor(output: Any) -> torch.Tensor:
    """A model output's logits."""
    return output.logits
