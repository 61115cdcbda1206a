"""A server in this process on a port of loopback: a tiny base with the small model's tokenizer, and three adapters."""

import pytest
import torch
from loopback import TENANTS, serving, tenant
from openai import OpenAI
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakit.embedded import model_path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="session")
def base(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    # Far apart from each other, so that greedy answers differ.
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def tenants(base):
    """PEFT's models, by adapter."""
    return {name: tenant(base, seed) for seed, name in enumerate(TENANTS)}


@pytest.fixture(scope="session")
def served(base, tenants, tokenizer):
    with serving(base, tenants, tokenizer) as app:
        yield app


@pytest.fixture(scope="session")
def url(served):
    return served.url


@pytest.fixture(scope="session")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
