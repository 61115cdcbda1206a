"""FlashAttention as an operator, with PyTorch in the place of FlashAttention's function."""

import copy
from types import SimpleNamespace

import flash
import pytest
import torch
from architectures import ARCHITECTURES

from lorakit.engine import attention
from lorakit.engine.attention import cached_rows

BLOCK = 4
TABLE = torch.tensor([[5, 2, -1, -1, -1], [0, 3, 6, -1, -1], [1, -1, -1, -1, -1]], dtype=torch.int32)
LENGTHS = torch.tensor([4, 9, 0], dtype=torch.int32)


@pytest.fixture
def with_flash(monkeypatch):
    asked = []
    monkeypatch.setattr(
        attention, "lazy_import_flash_attention", lambda name: (asked.append(name), flash.functions())[1]
    )
    return asked


@pytest.fixture
def model():
    """In bfloat16: with float32 FlashAttention does nothing."""
    model = copy.deepcopy(ARCHITECTURES["llama"].build()).to(torch.bfloat16)
    model.config._attn_implementation = "flash_attention_3"
    return model


def decoding(model, rows=3):
    """The arguments of a forward of one token a row, as transformers' continuous batching makes them."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    shape = 2, config.num_hidden_layers, 7, BLOCK, config.num_key_value_heads, size
    storage = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    allocator = SimpleNamespace(
        index=0,
        layer_type="full_attention",
        num_key_value_heads=config.num_key_value_heads,
        get_cache_for_block_table=lambda layer: (storage[0, layer], storage[1, layer]),
    )
    sums = torch.nn.functional.pad((LENGTHS + 1).cumsum(0), (1, 50)).to(torch.int32)
    batch = {
        "input_ids": torch.tensor([7, 8, 9, *[0] * 20])[:rows].unsqueeze(0),
        "position_ids": torch.tensor([*LENGTHS.tolist(), *[0] * 30])[:rows].unsqueeze(0),
        "attention_mask": None,
        "cu_seq_lens_q": torch.arange(11, dtype=torch.int32)[: rows + 1],
        "cu_seq_lens_k": {"full_attention": sums[: rows + 1]},
        "max_length_q": 1,
        "max_length_k": {"full_attention": 1},
        "block_table": torch.nn.functional.pad(TABLE, (0, 0, 0, 40))[None][:, :rows],
        "cache": SimpleNamespace(
            layer_to_allocator=[allocator] * config.num_hidden_layers, cache_allocators={"full_attention": allocator}
        ),
        "use_cache": False,
        "is_causal": True,
    }
    return batch | {"cached_rows": cached_rows(batch)}, storage


def test_rows_are_as_the_cache_has_them(model):
    batch, _ = decoding(model)
    lengths, table, tickets = batch["cached_rows"]["full_attention"]
    assert lengths.equal(LENGTHS) and lengths.dtype == torch.int32 and table.equal(TABLE)
    heads = model.config.num_key_value_heads
    assert tickets.equal(torch.zeros(len(LENGTHS) * heads, dtype=torch.int32))
    assert cached_rows(batch | {"block_table": None}) is None


@torch.no_grad()
def test_each_row_attends_to_its_own_cache(model, with_flash):
    """Against the model over what the caches were made of: row 1's by nine tokens before."""
    batch, storage = decoding(model)
    before = storage.clone()
    logits = model(**batch).logits
    assert with_flash == ["flash_attention_3"] * model.config.num_hidden_layers
    assert logits.shape[:2] == (1, 3) and logits.isfinite().all()
    written = (storage != before).flatten(4).any(-1).any(0).any(0).nonzero().tolist()
    assert written == [[1, 0], [2, 0], [6, 1]], "a place of each row, and no other"
    # A row alone gives the same, and what other rows hold does not matter.
    other, caches = decoding(model)
    caches[:, :, [0, 3, 6]] = 0
    assert model(**other).logits[0, [0, 2]].equal(logits[0, [0, 2]])
    assert not model(**decoding(model)[0] | {"position_ids": torch.zeros(1, 3, dtype=torch.long)}).logits.equal(logits)


@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_batches_of_any_size(model, with_flash):
    expected = model(**decoding(model)[0]).logits
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    forward = torch.compile(lambda model, inputs: model(**inputs).logits, backend=backend, fullgraph=True, dynamic=True)
    found = forward(model, decoding(model)[0])
    assert found.equal(expected)
    fewer, _ = decoding(model, rows=2)
    assert torch.allclose(forward(model, fewer).float(), expected[:, :2].float(), atol=0.05)
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.parametrize("change", [{"cached_rows": None}, {"softcap": 30.0}], ids=str)
def test_what_is_not_the_operators_goes_to_transformers(model, monkeypatch, change):
    asked = []
    original = attention.ALL_ATTENTION_FUNCTIONS["flash_attention_3"].__closure__
    assert any(
        cell.cell_contents.__module__.startswith("transformers.") for cell in original if callable(cell.cell_contents)
    )
    monkeypatch.setattr(
        "transformers.integrations.flash_attention._flash_attention_forward",
        lambda query, *_, **__: (asked.append(1), torch.zeros_like(query))[1],
    )
    batch, _ = decoding(model)
    batch["cache"] = None
    model(**batch | change)
    assert len(asked) == model.config.num_hidden_layers
