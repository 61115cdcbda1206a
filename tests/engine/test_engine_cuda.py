"""The engine's promises on a GPU: the same answers with graphs and without, loads beside the computation."""

import copy
import inspect

import pytest
import served as small
import torch
from served import alone, drawn, family, requests, served
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from lorakit import Engine, MultiLoraModel
from lorakit.engine import batching
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
    """In 16 bits near ties may fall either way, so what is compared is the probability of what was chosen.

    It may be no further from float64's than the model's own.
    """
    model, exact = model_on_gpu(torch.bfloat16), small.model_of()
    asked = requests(40, [None, "lora", "rslora", "dora"])
    with Engine(model, config(page_size=256, **settings)) as engine:
        handles = [
            engine.submit(
                one.prompt, one.adapter, max_new_tokens=one.tokens, logprobs=True, top_logprobs=2 * (place % 2)
            )
            for place, one in enumerate(asked)
        ]
        found = [handle.result(120) for handle in handles]
        assert engine._batching.batch_processor.cache.in_place == _reads_tables(model.model.config._attn_implementation)
    assert "Failed to warm up" not in caplog.text
    for completion in found[1::2]:  # greedy: what is drawn is the most likely
        places = zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True)
        assert all(top[0] == (token, logprob) and top[0].logprob >= top[1].logprob for token, logprob, top in places)
    errors, own, others = [], [], []
    for one, completion in zip(asked, found, strict=True):
        ids, count = torch.tensor([[*one.prompt, *completion.token_ids]]), len(completion.token_ids)
        expected = _likely(exact, ids, one.adapter, count)
        errors.append(torch.tensor(completion.logprobs, dtype=torch.float64) - expected)
        own.append(_likely(model, ids.cuda(), one.adapter, count) - expected)
        others.append(_likely(exact, ids, "lora" if one.adapter is None else None, count) - expected)
    errors, own, others = (torch.cat(each).abs() for each in (errors, own, others))
    assert errors.mean() <= 1.2 * own.mean() and errors.max() <= 2 * own.max()
    assert others.mean() > 4 * own.mean(), "with another adapter it would be no different"


def _reads_tables(implementation):
    """Whether what is installed takes the rows of prompts by a table of blocks."""
    (_, varlen, cached, _, _), _ = lazy_import_flash_attention(implementation)
    if implementation == "flash_attention_2":
        return "block_table" in inspect.signature(varlen).parameters
    return "cu_seqlens_q" in inspect.signature(cached).parameters


@torch.no_grad()
def _likely(model, ids, name, count):
    """The logarithms of the probabilities of the last tokens, each after those before it, in float64."""
    logits = model(ids, adapter_ids=[name]).logits[0, -count - 1 : -1].double()
    return logits.log_softmax(-1).gather(-1, ids[0, -count:, None])[:, 0].cpu()


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


def test_tokens_are_drawn_alike_with_graphs_and_without(monkeypatch):
    """Also if there is no room for more than two graphs."""
    model = model_on_gpu()
    with Engine(model, config(cuda_graphs=False)) as engine:
        expected = drawn(engine)
    for most in (256, 2):
        monkeypatch.setattr(batching, "_MOST_GRAPHS", most)
        with Engine(model, config(cuda_graphs=True)) as engine:
            assert drawn(engine) == expected
            assert 0 < len(engine._batching.batch_processor.model_runner._graphs) <= most


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
