"""The engine's promises on a GPU: the same answers with graphs and without, loads beside the computation."""

import copy

import pytest
import served as small
import torch
from served import alone, family, requests, served
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lorakit import Engine, MultiLoraModel
from lorakit.engine.batching import Runner

pytestmark = pytest.mark.gpu


GRAPHS = {"cuda_graphs": True}
SETTINGS = [{}, GRAPHS, {"compile_level": 1}, {**GRAPHS, "compile_level": 1}]


def config(**changes):
    """Of a small cache: others may use the GPU."""
    return small.config(cache_memory=1 << 26, **changes)


def model_on_gpu(dtype=torch.float32, **options):
    # The kernels know no float64; tiny float32 models have few near ties.
    model = MultiLoraModel(copy.deepcopy(family()[0]).to("cuda", dtype), **options)
    for name, tenant in family()[1].items():
        model.load_adapter(name, tenant)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_request_of_a_mix_gives_what_it_gives_alone(settings):
    model = model_on_gpu()
    asked = requests(40, [None, *family()[1]])
    expected = [alone(model, one) for one in asked]
    with Engine(model, config(**settings)) as engine:
        for _ in range(2):
            assert served(engine, asked) == expected


@pytest.mark.skipif(
    not (is_flash_attn_2_available() or is_flash_attn_3_available()), reason="needs a package of FlashAttention"
)
@pytest.mark.parametrize("settings", [{"cuda_graphs": None}, *SETTINGS], ids=str)
def test_with_flash_attention_tokens_are_as_likely_as_the_model_says(settings, caplog):
    """In 16 bits near ties may fall either way, so what is compared is the probability of what was chosen."""
    model = model_on_gpu(torch.bfloat16)
    asked = requests(40, [None, "lora", "rslora", "dora"])
    with Engine(model, config(page_size=256, **settings)) as engine:
        handles = [engine.submit(one.prompt, one.adapter, max_new_tokens=one.tokens, logprobs=True) for one in asked]
        served = [handle.result(60) for handle in handles]
    assert "Failed to warm up" not in caplog.text
    apart = []
    for one, found in zip(asked, served, strict=True):
        ids = torch.tensor([[*one.prompt, *found.token_ids]], device="cuda")
        likely, unlike = (
            _likely(model, ids, name, len(found.token_ids)) for name in (one.adapter, _other(one.adapter))
        )
        assert torch.allclose(torch.tensor(found.logprobs), likely, atol=0.06)
        apart.append((likely - unlike).abs().mean())
    assert torch.stack(apart).mean() > 0.2, "with another adapter it would be no different"


def _likely(model, ids, name, count):
    """Of the last tokens, each after those before it."""
    with torch.no_grad():
        logits = model(ids, adapter_ids=[name]).logits[0, -count - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, -count:, None])[:, 0].cpu()


def _other(name):
    return "lora" if name is None else None


def test_one_graph_serves_every_mix(monkeypatch):
    captured = []
    capture = Runner._capture_graph
    monkeypatch.setattr(Runner, "_capture_graph", lambda *args: (captured.append(args), capture(*args)))
    model = model_on_gpu()
    with Engine(model, config(cuda_graphs=True)) as engine:
        names = ["lora", "rslora", "dora", "embeddings"]
        for _ in range(2):
            served(engine, requests(20, names, seed=1))
        before = len(captured)
        for seed in range(5):
            served(engine, requests(20, names[seed % 4 :], seed=1))
        assert len(captured) == before


def test_adapters_that_come_in_change_nothing_for_those_that_run():
    model = model_on_gpu(adapter_memory=1 << 20)
    asked = requests(60, [None, *family()[1]], seed=4)
    expected = [alone(model, one) for one in asked]
    with Engine(model, config(cuda_graphs=True)) as engine:
        assert served(engine, asked) == expected
    torch.cuda.synchronize()


def test_engines_one_after_another_in_one_process():
    """What is left of a closed one must not be freed while the next one captures."""
    model = model_on_gpu()
    asked = requests(10, ["lora", "dora"])
    expected = None
    for _ in range(4):
        with Engine(model, config(cuda_graphs=True)) as engine:
            found = served(engine, asked)
        assert expected in (None, found)
        expected = found
