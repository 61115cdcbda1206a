"""A server in this process on a port of loopback: a tiny base with the small model's tokenizer, and three adapters."""

import pytest
from loopback import TENANTS, serving
from openai import OpenAI
from speaking import speaking_base, tenant_of
from transformers import AutoTokenizer

from lorakit.embedded import model_path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="session")
def base(tokenizer):
    return speaking_base(tokenizer)


@pytest.fixture(scope="session")
def tenants(base):
    """PEFT's models, by adapter."""
    return {name: tenant_of(base, seed) for seed, name in enumerate(TENANTS)}


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
