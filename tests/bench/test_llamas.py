"""The shapes are those of the models that they are named after, and their caches as large as is said."""

import pytest
import torch
from tiny import CPU, TINY

from lorakit.bench import llamas
from lorakit.bench.llamas import Llama, blocks, with_liger
from lorakit.engine.batching import blocks_in


@pytest.mark.parametrize(
    "shape, parameters",
    [(llamas.LLAMA_2_7B, 6_738_415_616), (llamas.LLAMA_2_13B, 13_015_864_320), (llamas.LLAMA_3_8B, 8_030_261_248)],
)
def test_shapes(shape, parameters):
    llama = Llama(shape, attention="sdpa")
    base = llama.build(torch.device("meta"))
    assert sum(parameter.numel() for parameter in base.parameters()) == parameters
    base.config._attn_implementation = "flash_attention_3"  # without which a cache needs a mask
    assert blocks(32, 272) == 96 == blocks_in(llama.cache_bytes(32, 272), base, llamas.PAGE, 8192)


def test_without_liger_kernel(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not with_liger(TINY.build(CPU), "some")
    assert capsys.readouterr().out == "some: without liger-kernel, which is not installed\n"
