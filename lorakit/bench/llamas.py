"""The bases of the engine's benchmarks: Llamas of known shapes with random weights."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lorakit.console import make_console

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
LLAMA_2_13B = {
    **LLAMA_2_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_3_8B = {
    **LLAMA_2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The modules that the adapters touch."""

PAGE = 256
"""Tokens of a block of the engine's cache on a GPU."""


class Llama(NamedTuple):
    """A base and the adapters on it.

    Attributes:
        shape: of the Llama, as `LlamaConfig` takes it.
        dtype: of its weights, and of the adapters'.
        attention: transformers' implementation.
        rank: of the adapters, on all of `LINEARS`.
    """

    shape: dict[str, Any] = LLAMA_2_7B
    dtype: torch.dtype = torch.bfloat16
    attention: str = "flash_attention_3"
    rank: int = 16

    def as_json(self) -> dict[str, Any]:
        """What a result is saved with."""
        return {**self._asdict(), "dtype": str(self.dtype)}

    @property
    def vocabulary(self) -> int:
        """Its tokens."""
        return self.shape["vocab_size"]

    def build(self, device: torch.device) -> PreTrainedModel:
        """The base, of random weights."""
        with torch.device(device):
            return LlamaForCausalLM._from_config(
                LlamaConfig(**self.shape), attn_implementation=self.attention, dtype=self.dtype
            ).eval()

    def cache_bytes(self, rows: int, tokens: int) -> int:
        """Bytes of the key-value cache of so many rows of so many tokens each."""
        heads = self.shape["hidden_size"] // self.shape["num_attention_heads"] * self.shape["num_key_value_heads"]
        token = 2 * heads * self.shape["num_hidden_layers"] * self.dtype.itemsize
        return blocks(rows, tokens) * PAGE * token


def blocks(rows: int, tokens: int) -> int:
    """Blocks of the cache for so many rows of so many tokens each: one more for each row than it fills."""
    return rows * (-(-tokens // PAGE) + 1)


def prompts(rows: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Prompts of one length, of random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(5, vocabulary - 1, (rows, tokens), generator=generator).tolist()


def with_liger(base: PreTrainedModel, name: str) -> bool:
    """Puts liger-kernel's norms, rotary embeddings and activations into a Llama, if it is installed.

    They stay, also in transformers' own module: whatever is to be measured without them comes before.

    Args:
        base: the Llama.
        name: the benchmark's, for what is printed where it is not installed.

    Returns:
        Whether they are in.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        make_console().print(f"{name}: without liger-kernel, which is not installed")
        return False
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore[import-not-found]

    apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=base)
    return True


def twin(base: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same weights, which lie in memory once; for what changes a model's modules."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()})
