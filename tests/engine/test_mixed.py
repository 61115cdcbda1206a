"""Batches in which prompts begin beside rows that are decoded: the cache is read where it is."""

from types import SimpleNamespace

import flash
import pytest
import torch
from served import alone, at_rest, config, double, drawn, family, model_of, requests, served
from transformers.generation.continuous_batching import initialization, model_runner
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from lorakit import Engine, MultiLoraModel
from lorakit.engine import attention, batching, in_place
from lorakit.engine.attention import MixedRows, cached_rows, mixed_attention
from lorakit.engine.batching import Runner
from lorakit.engine.in_place import may_read_in_place, operator_works
from lorakit.errors import EngineCrashedError

BLOCK = 4


@pytest.fixture
def calls(monkeypatch):
    """What ran, in an engine that has FlashAttention on the CPU: names, and tokens that were copied from a cache."""
    calls, update, mixed = [], FullAttentionCacheAllocator.update, attention._prompts_by_flash_attention

    def copied(allocator, keys, values, layer, reads, writes):
        if reads.numel():
            calls.append("copied")
        return update(allocator, keys, values, layer, reads, writes)

    def prompts(query, key, value, attention_mask, *, softmax_scale, cu_seq_lens_q, cu_seq_lens_k, **_):
        calls.append("prompts")
        given = (one[0] for one in (query, key, value))
        return flash.varlen(*given, cu_seq_lens_q, cu_seq_lens_k, 10**6, 10**6, softmax_scale, True)[None]

    monkeypatch.setattr(FullAttentionCacheAllocator, "update", copied)
    monkeypatch.setattr("transformers.integrations.flash_attention._flash_attention_forward", prompts)
    monkeypatch.setattr(attention, "lazy_import_flash_attention", lambda name: flash.functions())
    monkeypatch.setattr(
        attention, "_prompts_by_flash_attention", lambda *given: (calls.append("mixed"), mixed(*given))[1]
    )

    widths(monkeypatch, 32)
    return calls


def widths(monkeypatch, blocks):
    """transformers' tables have room for so many blocks of a row."""

    def resolve(config, cb_config, requested):
        cb_config.max_blocks_per_request = blocks

    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", resolve)


def give_kernel(monkeypatch, calls):
    """PyTorch in the place of `lorakit_kernels.attend`, for attention alone."""

    def attend(*args):
        calls.append("ours")
        return flash.append_and_attend(*args)

    kernels = SimpleNamespace(has_kernels=lambda *_: True, can_attend=lambda *_: True, attend=attend)
    for module in (attention, in_place):
        monkeypatch.setattr(module, "ops", kernels)


def model_with_flash(name="flash_attention_3", architecture="llama"):
    model = model_of() if architecture == "llama" else MultiLoraModel(double(architecture))
    model.model.config._attn_implementation = name
    return model


def asked():
    return requests(25, [None, *family()[1]], longest=30)


@pytest.fixture(scope="module")
def expected():
    """Of `asked`."""
    model = model_of()
    return [alone(model, one) for one in asked()]


@pytest.mark.parametrize("pads", [False, True], ids=["as they are", "padded"])
@pytest.mark.parametrize("with_kernel", [False, True], ids=["FlashAttention alone", "with lorakit's kernel"])
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_each_request_of_a_mix_gives_what_it_gives_alone(monkeypatch, calls, expected, name, with_kernel, pads):
    if with_kernel:
        give_kernel(monkeypatch, calls)
    if pads:
        monkeypatch.setattr(Runner, "pad_inputs", property(lambda self: True, lambda self, value: None), raising=False)
    with Engine(model_with_flash(name), config()) as engine:
        calls.clear()  # of warming up
        assert served(engine, asked()) == expected
        at_rest(engine)
    assert {"mixed", "prompts"} <= set(calls) and "copied" not in calls
    assert ("ours" in calls) == with_kernel


def test_rows_longer_than_the_table_are_copied(monkeypatch, calls, expected):
    monkeypatch.setattr(batching, "_MOST_BLOCKS", 9)
    with Engine(model_with_flash(), config()) as engine:
        calls.clear()
        assert served(engine, asked()) == expected
    assert {"mixed", "copied"} <= set(calls)


@pytest.mark.parametrize(
    ("name", "with_kernel", "is_wide"),
    [("flash_attention_2", False, False), ("flash_attention_2", True, True), ("flash_attention_3", False, True)],
)
def test_tables_have_room_for_all_positions_where_that_costs_nothing(monkeypatch, calls, name, with_kernel, is_wide):
    widths(monkeypatch, 5)
    if with_kernel:
        give_kernel(monkeypatch, calls)
    model = model_with_flash(name)
    for page_size, blocks in ((4, 16), (48, 2), (64, 2)):
        with Engine(model, config(page_size=page_size)) as engine:
            cache = engine._batching.batch_processor.cache
            blocks = blocks if is_wide else min(blocks, 5)
            assert (cache.max_blocks_per_request, cache.max_decode_fast_path_length) == (blocks, blocks * page_size)


class Replayed:
    """Stands for a CUDA graph: runs once more what was captured, on the tensors and by the adapters of then."""

    FIXED = ("_table", "_serving")

    def __init__(self, runner, forward, args):
        self._runner, self._forward = runner, lambda: forward(*args)
        self._fixed = {name: getattr(runner, name) for name in self.FIXED}

    def replay(self):
        now = {name: getattr(self._runner, name) for name in self.FIXED}
        vars(self._runner).update(self._fixed)
        self._forward()
        vars(self._runner).update(now)

    def reset(self):
        """Has nothing."""


@pytest.fixture
def captured(monkeypatch):
    """Sizes of which a forward was captured, in an engine that has CUDA graphs on the CPU."""
    sizes = []

    def capture(runner, forward, stream, *args):
        forward(*args)
        sizes.append(runner.inputs_and_outputs._get_graph_key())
        runner.inputs_and_outputs.set_graph(Replayed(runner, forward, args))

    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(Runner, "_capture_graph", capture)
    for name in ("pad_inputs", "use_cuda_graph_varlen", "use_cuda_graph_decode"):
        monkeypatch.setattr(Runner, name, property(lambda self: True, lambda self, value: None), raising=False)
    return sizes


@pytest.fixture(scope="module")
def in_all_ways():
    with Engine(model_of(), config()) as engine:
        return drawn(engine)


@pytest.mark.parametrize("longest", [1024, 8])
def test_what_is_replayed_was_captured_when_the_engine_started(monkeypatch, in_all_ways, calls, captured, longest):
    """One forward a size of a batch, whatever its rows have in the cache, and however they are drawn."""
    monkeypatch.setattr(batching, "_MOST_REPLAYED", longest)
    monkeypatch.setitem(initialization.FALLBACK_DEFAULTS, "q_padding_interval_size", 8)
    with Engine(model_with_flash(), config()) as engine:
        sizes = sorted(captured)
        assert [size[0] for size in sizes if size[1:] == (0, 1)] == [size for size in (8, 16, 24) if size <= longest]
        assert [size for size in sizes if len(size) == 1] == [(1,), (2,), (4,), (6,)]
        calls.clear()
        for _ in range(2):
            assert drawn(engine) == in_all_ways
        assert sorted(captured) == sizes
        assert set(calls) == ({"mixed"} if longest == 1024 else {"mixed", "prompts"})
        at_rest(engine)


@pytest.mark.parametrize(
    ("architecture", "page_size", "tokens"), [("llama", 64, 24), ("opt", 32, 72), ("gpt2", 64, 72)]
)
def test_warming_up_goes_past_no_end(calls, captured, caplog, architecture, page_size, tokens):
    """Of a table, of learned positions: what it raises, transformers only logs."""
    model = model_with_flash(architecture=architecture)
    with Engine(model, config(page_size=page_size, max_batch_tokens=tokens)):
        assert "Failed to warm up" not in caplog.text
        assert len(captured) > 4


def test_only_so_many_are_kept(monkeypatch, in_all_ways, calls, captured):
    monkeypatch.setattr(batching, "_MOST_GRAPHS", 2)
    with Engine(model_with_flash(), config()) as engine:
        started = len(captured)
        assert drawn(engine) == in_all_ways
        assert len(captured) > started and len(engine._batching.batch_processor.model_runner._graphs) == 2


def with_softcap(monkeypatch, model):
    layer = model.model.model.layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: forward(*args, **kwargs, softcap=30.0))


def test_for_a_base_with_other_attention_rows_are_copied(monkeypatch, calls):
    """Which none knows before its layers are called. What stands for FlashAttention here would give other tokens."""
    model = model_with_flash()
    with_softcap(monkeypatch, model)
    with Engine(model, config()) as engine:
        calls.clear()
        served(engine, asked())
    assert "copied" in calls and "mixed" not in calls


def test_a_layer_whose_attention_becomes_another_is_no_silent_error(monkeypatch, calls):
    model = model_with_flash()
    with Engine(model, config(restarts=0)) as engine:
        with_softcap(monkeypatch, model)
        with pytest.raises(EngineCrashedError) as raised:
            served(engine, asked())
        assert "layer 1 (LlamaAttention) calls attention with other arguments" in str(raised.value.__cause__)


def rows_of(counts, befores, *, tokens, rows):
    """`MixedRows` of rows with so many new tokens, and so many before, in a batch padded to so many."""
    begins = torch.tensor([0, *counts]).cumsum(0)
    ends = torch.tensor([0, *(map(sum, zip(counts, befores, strict=True)))]).cumsum(0)
    pad = rows - len(counts)
    begins, ends = (torch.cat([one, one[-1:].expand(pad)]).int() for one in (begins, ends))
    blocks = iter(range(100))
    width = 5
    table = torch.full((1, rows, width), -1, dtype=torch.int32)
    places = []
    for row, (count, before) in enumerate(zip(counts, befores, strict=True)):
        needed = -(-(count + before) // BLOCK)
        table[0, row, :needed] = torch.tensor([next(blocks) for _ in range(needed)])
        places += [int(table[0, row, at // BLOCK]) * BLOCK + at % BLOCK for at in range(before, before + count)]
    trash = 30 * BLOCK
    allocator = SimpleNamespace(index=0, layer_type="full_attention", num_key_value_heads=2)
    batch = {
        "cache": SimpleNamespace(cache_allocators={"full_attention": allocator}),
        "block_table": None,
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": {"full_attention": ends},
        "write_index": [torch.tensor(places + [trash] * (tokens - len(places)))],
    }
    assert cached_rows(batch) is None
    return cached_rows(batch, table)["full_attention"]


def test_rows_are_as_the_batch_has_them():
    rows = rows_of([1, 1, 3, 1], [4, 0, 2, 7], tokens=8, rows=6)
    assert isinstance(rows, MixedRows)
    assert rows.begins.tolist() == [0, 1, 2, 5, 6, 6, 6] and rows.prompts.tolist() == [2, 2, 2, 5, 6, 6, 6]
    assert rows.lengths.tolist() == [5, 1, 5, 8, 0, 0] and rows.ends.tolist() == [0, 5, 6, 11, 19, 19, 19]
    assert rows.singles.tolist() == [4, 0, -1, -1, -1, -1]
    assert {one.dtype for one in rows[1:]} == {torch.int32} and not rows.tickets.any() and len(rows.tickets) == 12
    none = rows_of([3, 1], [2, 7], tokens=4, rows=2)
    assert none.prompts.equal(none.begins) and none.singles.tolist() == [-1, -1]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("with_kernel", [False, True])
def test_tokens_attend_to_those_before_them(with_flash, monkeypatch, name, with_kernel):
    if with_kernel:
        give_kernel(monkeypatch, [])
    counts, befores = [1, 1, 3, 1, 6], [4, 0, 2, 7, 0]
    rows = rows_of(counts, befores, tokens=16, rows=8)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(16, heads, 8, generator=generator) for heads in (4, 2, 2))
    keys, values = (torch.randn(31, BLOCK, 2, 8, generator=generator) for _ in range(2))
    before = keys.clone(), values.clone()
    found = mixed_attention(query, key, value, keys, values, *rows, 0.3, name)
    begin = 0
    for row, (count, length) in enumerate(zip(counts, befores, strict=True)):
        new = slice(begin, begin + count)
        whole = [
            torch.cat([flash.of_blocks(cache, rows.table[row], length), more[new]])
            for cache, more in zip(before, (key, value), strict=True)
        ]
        assert torch.allclose(found[new], flash.attended(query[new], *whole, 0.3), atol=1e-6)
        assert flash.of_blocks(keys, rows.table[row], length + count).equal(whole[0])
        begin += count
    changed = (keys != before[0]).flatten(2).any(-1).sum()
    assert changed == sum(counts) + 1, "a place of each token, and one for those that pad"


def cache_of(heads=2, size=8, page=BLOCK, **changes):
    kind = "full_attention"
    allocator = SimpleNamespace(layer_type=kind, num_key_value_heads=heads, head_dim=size, tokens_per_page=page)
    found = {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "max_blocks_per_request": 32,
        "max_decode_fast_path_length": 32 * page,
        "cache_allocators": {kind: allocator},
    }
    return SimpleNamespace(**found | changes)


def base(name="flash_attention_3"):
    """Its config."""
    return SimpleNamespace(_attn_implementation=name)


@pytest.mark.parametrize(
    "change",
    [
        {"max_decode_fast_path_length": 0},
        {"dtype": torch.float32},
        {"cache_allocators": {"sliding_attention": SimpleNamespace(layer_type="sliding_attention")}},
    ],
    ids=str,
)
def test_which_caches_cannot_be_read(change):
    assert may_read_in_place(base(), cache_of())
    assert not may_read_in_place(base(), cache_of(**change))
    assert not may_read_in_place(base("sdpa"), cache_of())


@pytest.fixture
def with_flash(monkeypatch):
    """Takes what FlashAttention's functions are."""

    def put(**changes):
        monkeypatch.setattr(attention, "lazy_import_flash_attention", lambda name: flash.functions(**changes))

    put()
    return put


SHAPES = [(2, {}), (1, {"heads": 4}), (2, {"size": 64, "page": 256})]


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("group", "shape"), SHAPES, ids=str)
def test_what_is_right_is_used(with_flash, monkeypatch, caplog, name, dtype, group, shape):
    assert operator_works(cache_of(dtype=dtype, **shape), group, name)
    give_kernel(monkeypatch, [])
    assert operator_works(cache_of(dtype=dtype, **shape), group, name)
    assert not caplog.records


def older(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, page_table=None, softmax_scale=None, causal=False):
    """Without `cu_seqlens_q`."""


def test_what_raises_is_not_used(with_flash, caplog):
    with_flash(with_kvcache=older)
    assert not operator_works(cache_of(), 2, "flash_attention_3")
    assert "was tried, and raised TypeError" in caplog.text
    with_flash(varlen=older)
    assert not operator_works(cache_of(), 2, "flash_attention_2")


def wrong(how):
    """FlashAttention with an error in it."""

    def with_kvcache(q, k_cache, v_cache, cache_seqlens=None, page_table=None, cu_seqlens_q=None, max_seqlen_q=None,
                     softmax_scale=None, causal=False, num_splits=0):  # fmt: skip
        assert num_splits == 1
        if how == "a token short":
            cache_seqlens = cache_seqlens - 1
        if how == "the first block alone":
            page_table = page_table[:, :1].expand_as(page_table)
        if how == "another scale":
            softmax_scale *= 0.9
        if how == "aligned at the top":  # each token sees as many as the first ones do
            cu = cu_seqlens_q.diff()
            cache_seqlens = torch.where(cu > 1, cu, cache_seqlens)
        return flash.with_kvcache(
            q,
            k_cache,
            v_cache,
            None,
            None,
            cache_seqlens,
            page_table,
            cu_seqlens_q,
            max_seqlen_q,
            softmax_scale,
            causal,
        )

    return with_kvcache


@pytest.mark.parametrize("how", ["a token short", "the first block alone", "another scale", "aligned at the top"])
@pytest.mark.parametrize("shape", [{}, {"heads": 4}, {"size": 64, "page": 256}, {"size": 128, "page": 256}], ids=str)
@pytest.mark.parametrize("with_kernel", [False, True])
def test_what_errs_is_not_used(with_flash, monkeypatch, caplog, how, shape, with_kernel):
    if with_kernel:
        give_kernel(monkeypatch, [])
    with_flash(with_kvcache=wrong(how))
    assert not operator_works(cache_of(**{"heads": 4} | shape), 1, "flash_attention_3")
    assert "was tried, and erred by" in caplog.text
    with_flash(with_kvcache=wrong("not at all"))
    assert operator_works(cache_of(**{"heads": 4} | shape), 1, "flash_attention_3")


def test_later_tokens_are_not_seen(with_flash, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tril", lambda one, *_: one)
    assert not operator_works(cache_of(), 2, "flash_attention_3")
    assert not operator_works(cache_of(heads=4, size=64, page=256), 1, "flash_attention_3")
