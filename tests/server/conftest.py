"""A server in this process on a port of loopback: a tiny base with the small model's tokenizer, and three adapters."""

import copy
import threading
import time

import pytest
import torch
import uvicorn
from loopback import BASE, TENANTS
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorakit import Engine, MultiLoraModel
from lorakit.embedded import model_path
from lorakit.engine.config import EngineConfig
from lorakit.server.app import create_app
from lorakit.server.served import Served


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
def model(base):
    found = MultiLoraModel(copy.deepcopy(base))
    for seed, name in enumerate(TENANTS):
        torch.manual_seed(seed + 1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        found.load_adapter(name, get_peft_model(copy.deepcopy(base), config))
    return found


@pytest.fixture(scope="session")
def served(model, tokenizer):
    def load():
        config = EngineConfig(max_requests=8, max_batch_tokens=256, cache_memory=1 << 24, stop_timeout=10)
        return Served(Engine(model, config, decode=tokenizer.decode).start(), tokenizer, BASE)

    app = create_app(load)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not (server.started and app.served):
        assert thread.is_alive() and app.failed is None and time.monotonic() < end
        time.sleep(0.02)
    app.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield app
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and app.served.engine.state == "closed"


@pytest.fixture(scope="session")
def url(served):
    return served.url


@pytest.fixture(scope="session")
def client(url):
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
