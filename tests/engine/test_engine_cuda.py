"""The engine's promises on a GPU: the same answers with graphs and without, loads beside the computation."""

import copy
import dataclasses

import pytest
import torch
from served import SMALL, alone, family, requests, served

from lorakit import Engine, MultiLoraModel
from lorakit.engine.batching import Runner

pytestmark = pytest.mark.gpu


def model_on_gpu(**options):
    # The kernels know no float64; tiny float32 models have few near ties.
    model = MultiLoraModel(copy.deepcopy(family()[0]).cuda(), **options)
    for name, tenant in family()[1].items():
        model.load_adapter(name, tenant)
    return model


@pytest.mark.parametrize("settings", [{}, {"cuda_graphs": True}, {"compile_level": 1}], ids=str)
def test_each_request_of_a_mix_gives_what_it_gives_alone(settings):
    model = model_on_gpu()
    asked = requests(40, [None, *family()[1]])
    expected = [alone(model, one) for one in asked]
    with Engine(model, dataclasses.replace(SMALL, **settings)) as engine:
        for _ in range(2):
            assert served(engine, asked) == expected


def test_one_graph_serves_every_mix(monkeypatch):
    captured = []
    capture = Runner._capture_graph
    monkeypatch.setattr(Runner, "_capture_graph", lambda *args: (captured.append(args), capture(*args)))
    model = model_on_gpu()
    with Engine(model, dataclasses.replace(SMALL, cuda_graphs=True)) as engine:
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
    with Engine(model, dataclasses.replace(SMALL, cuda_graphs=True)) as engine:
        assert served(engine, asked) == expected
    torch.cuda.synchronize()
