"""The engine's promises: what it gives, when it ends, and that it always does."""

import asyncio
import copy
import dataclasses
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from architectures import VOCAB
from served import (
    INVOCATION,
    PROMPT,
    SMALL,
    Asked,
    alone,
    at_rest,
    config,
    double,
    family,
    model_of,
    requests,
    served,
    wait_for,
)

import lorakit
from lorakit import Engine, MultiLoraModel
from lorakit.engine.batching import Runner
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import (
    AdapterExistsError,
    AdapterIdsError,
    AdapterNotFoundError,
    BankCorruptedError,
    ConfigError,
    DeadlineExceededError,
    EngineBusyError,
    EngineCrashedError,
    EngineStoppedError,
    ModelInUseError,
    PoolFullError,
    RequestError,
)
from lorakit.runtime import ops
from lorakit.runtime.standing import StandingRouting

# What it gives


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "opt", "qwen3-moe", "gpt-oss"])
def test_each_request_of_a_mix_gives_what_it_gives_alone(name):
    model = model_of(name)
    asked = requests(25, [None, *family(name)[1]], longest=30)
    expected = [alone(model, one) for one in asked]
    with Engine(model, SMALL) as engine:
        assert served(engine, asked) == expected
        at_rest(engine)
    assert [alone(model, one) for one in asked[:2]] == expected[:2]


def test_what_transformers_makes_up_to_warm_up_runs(monkeypatch, caplog):
    @torch.no_grad()
    def warm_up(runner, base):
        runner.run_one_warmup(base, num_q_tokens=4, max_kv_read=0)

    monkeypatch.setattr(Runner, "warm_up", warm_up)
    with Engine(model_of(), SMALL):
        assert "Failed to warm up" not in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU, and this model is on the CPU")
def test_with_kernels_too(monkeypatch):
    """In Triton's interpreter: an adapter a token, in prompts and in decoding."""
    monkeypatch.setattr(ops, "has_kernels", lambda *_: True)
    model = MultiLoraModel(copy.deepcopy(family()[0]))
    for name, tenant in family()[1].items():
        model.load_adapter(name, tenant)
    asked = [Asked((11, 12, 13), name, 2) for name in ("lora", "dora", None)]
    expected = [alone(model_of(), one) for one in asked]
    made = []
    init = StandingRouting.__init__
    monkeypatch.setattr(StandingRouting, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1])
    with Engine(model, SMALL) as engine:
        assert served(engine, asked) == expected
        entered, forwards = _run_twice(monkeypatch)
        assert served(engine, asked) == expected
        assert len(entered) == len(forwards) > 0 == len(forwards) % 2
        assert len(made) <= 2, "the same batch serves every mix"


def _run_twice(monkeypatch):
    """Each batch as a graph's capture runs it: what the first forward leaves behind, a compiled second one would see.

    So each is to enter by itself.
    """
    entered, forwards = [], []
    standing_by, forward = MultiLoraModel.standing_by, Runner._logits_of

    def twice(runner, *args):
        for _ in range(2):
            forwards.append(runner)
            logits = forward(runner, *args)
        return logits

    monkeypatch.setattr(MultiLoraModel, "standing_by", lambda *args: (entered.append(args), standing_by(*args))[1])
    monkeypatch.setattr(Runner, "_logits_of", twice)
    return entered, forwards


def test_stats_tell_how_mixed_batches_are(model):
    prompts = [[11, 12, 13]] * 3
    with Engine(model, SMALL) as engine:
        engine.generate(prompts, max_new_tokens=5, progress=False)
        stats = engine.stats()
        assert stats.steps >= 5 and stats.segments == stats.steps
        # So many that they are in one batch for most of the time, however fast adapters come and tokens are made.
        engine.generate(prompts, ["lora", "dora", None], max_new_tokens=40, progress=False)
        more = engine.stats()
        assert more.segments - stats.segments > 2 * (more.steps - stats.steps) > 0
        engine.generate(prompts, "lora", max_new_tokens=5, progress=False)
        assert engine.stats().segments - more.segments == engine.stats().steps - more.steps


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5, "stop": ["99 "], "ignore_eos": True}])
def test_what_began_on_another_engine_goes_on(model, settings):
    prompt = [11, 12, *INVOCATION, 13]
    for name in (None, "lora", "alora"):
        with Engine(model, SMALL, decode=lambda tokens: " ".join(map(str, tokens))) as engine:
            first = engine.submit(prompt, name, max_new_tokens=20, **settings)
            whole = first.result(60)
            assert len(whole.token_ids) > 2
            for begun in (1, len(whole.token_ids) // 2, len(whole.token_ids) - 1):
                request = dataclasses.replace(first.request, streamed=whole.token_ids[:begun])
                rest = engine.take(request).result(60)
                assert rest.token_ids == whole.token_ids[begun:]
                assert (rest.finish_reason, rest.stop) == (whole.finish_reason, whole.stop)
            at_rest(engine)


def test_sequences_that_are_served_apart_are_drawn_as_together(engine):
    together = engine.submit(PROMPT, "lora", max_new_tokens=8, temperature=1.0, seed=3, n=3)
    apart = [
        engine.take(dataclasses.replace(together.request, n=1, drawn_as=sequence)).result(60) for sequence in range(3)
    ]
    assert [one.token_ids for one in apart] == [one.token_ids for one in together.results(60)]


def test_a_request_that_was_checked_elsewhere_is_refused_where_its_adapter_is_not(engine):
    request = engine.submit(PROMPT, "lora", max_new_tokens=1).request
    with pytest.raises(AdapterNotFoundError, match="lara"):
        engine.take(dataclasses.replace(request, adapter="lara"))


def test_requests_that_must_leave_the_batch_give_the_same(model):
    """A cache of few blocks: running requests are thrown out, and begin again with what they have."""
    asked = [Asked(one.prompt, one.adapter, 20) for one in requests(20, [None, *family()[1]], seed=1)]
    expected = [alone(model, one) for one in asked]
    base = model.model
    from lorakit.engine.batching import blocks_in

    block = 1
    while not blocks_in(block, base, 4, 24) > 1:
        block *= 2
    with Engine(model, config(cache_memory=block * 9)) as engine:
        thrown_out = []
        scheduler = engine._batching.batch_processor.scheduler
        wait = scheduler.add_waiting_request

        def count(state):
            thrown_out.append(state._true_initial_tokens)
            wait(state)

        scheduler.add_waiting_request = count
        assert served(engine, asked) == expected
        at_rest(engine)
    assert any(thrown_out), "the cache was too large for this test"


def test_tokens_come_as_they_are_made(engine):
    handle = engine.submit(PROMPT, "lora", max_new_tokens=12)
    iterator = iter(handle)
    first = next(iterator)
    assert not handle.done
    rest = list(iterator)
    assert [token.id for token in (first, *rest)] == list(handle.result().token_ids)
    assert handle.result().finish_reason == "length" and len(rest) == 11
    assert 0 < handle.result().time_to_first_token < handle.result().seconds


def test_asyncio_reads_the_same(engine, model):
    async def main():
        handles = [engine.submit(PROMPT, name, max_new_tokens=6) for name in ("lora", None, "dora")]

        async def read(handle):
            return tuple([token.id async for token in handle])

        streamed = await asyncio.gather(*map(read, handles))
        assert streamed == [(await handle).token_ids for handle in handles]
        return streamed

    streamed = asyncio.run(main())
    engine.close()
    assert streamed == [alone(model, Asked(PROMPT, name, 6)) for name in ("lora", None, "dora")]


def test_generate_keeps_the_order_and_takes_one_name_for_all(engine):
    asked = requests(12, ["lora", None], seed=3)
    prompts = [one.prompt for one in asked]
    found = engine.generate(prompts, [one.adapter for one in asked], max_new_tokens=4, progress=False)
    assert [one.token_ids for one in found] == served(engine, [Asked(p, a, 4) for p, a, _ in asked])
    found = engine.generate(prompts, "lora", max_new_tokens=4, progress=False)
    assert [one.token_ids for one in found] == served(engine, [Asked(p, "lora", 4) for p in prompts])
    twice = engine.generate(prompts[:2], max_new_tokens=4, temperature=1.0, n=2, progress=False)
    assert len(twice) == 4
    assert engine.generate([], progress=False) == []
    with pytest.raises(AdapterIdsError, match="1 entries for 12 prompts"):
        engine.generate(prompts, ["lora"])
    with pytest.raises(RequestError, match="token 101"):
        engine.generate([prompts[0], [VOCAB]], progress=False)
    at_rest(engine)


@torch.no_grad()
def test_top_logprobs_are_those_of_the_model(model):
    """In batches with rows that want some, many or none, greedy and sampled."""
    with Engine(model, SMALL) as engine:
        settings = [("dora", 3, 0.0), (None, 20, 1.0), ("lora", 0, 0.0), ("rslora", 1, 1.0)]
        handles = [
            engine.submit(PROMPT, name, max_new_tokens=9, logprobs=True, top_logprobs=top, temperature=temperature)
            for name, top, temperature in settings
        ]
        plain = engine.submit(PROMPT, "lora", max_new_tokens=9)
        found = [handle.result(60) for handle in handles]
        assert plain.result(60).top_logprobs is None
        tokens = handles[0].tokens()
        with pytest.raises(RequestError, match="come with logprobs"):
            engine.submit(PROMPT, top_logprobs=2)
        with pytest.raises(RequestError, match="top_logprobs is 21"):
            engine.submit(PROMPT, logprobs=True, top_logprobs=21)
        at_rest(engine)
    assert found[2].top_logprobs is None and tokens[4].top == found[0].top_logprobs[4]
    for (name, top, _), one in zip(settings, found, strict=True):
        ids = torch.tensor([[*PROMPT, *one.token_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids, adapter_ids=name).logits[0, len(PROMPT) - 1 : -1]
        expected = logits.double().log_softmax(-1)
        for place, likely in enumerate(one.top_logprobs or ()):
            assert len(likely) == top
            best = expected[place].topk(top)
            torch.testing.assert_close(
                torch.tensor([one.logprob for one in likely]).double(), best.values, atol=1e-5, rtol=1e-5
            )
            assert {one.id for one in likely} == set(best.indices.tolist())
    assert [likely[0].id for likely in found[0].top_logprobs] == list(found[0].token_ids)


@torch.no_grad()
def test_logprobs_are_those_of_the_model(model):
    with Engine(model, SMALL) as engine:
        handles = [engine.submit(PROMPT, name, max_new_tokens=5, logprobs=True) for name in ("dora", None)]
        quiet = engine.submit(PROMPT, "lora", max_new_tokens=5)
        found = [handle.result(60) for handle in handles]
        assert quiet.result(60).logprobs is None
    for name, one in zip(("dora", None), found, strict=True):
        ids = torch.tensor([[*PROMPT, *one.token_ids]])
        logits = model(ids, adapter_ids=[name]).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, ids[0, len(PROMPT) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one.logprobs).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_seed_repeats_in_any_batch_and_sequences_differ(engine):
    settings = {"max_new_tokens": 10, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first = engine.submit(PROMPT, "lora", seed=7, n=3, **settings).results(60)
    others = [engine.submit(one.prompt, one.adapter, temperature=2.0) for one in requests(8, ["lora", None])]
    second = engine.submit(PROMPT, "lora", seed=7, n=3, **settings).results(60)
    assert [one.token_ids for one in first] == [one.token_ids for one in second]
    assert len({one.token_ids for one in first}) == 3
    assert engine.submit(PROMPT, "lora", seed=8, **settings).result(60).token_ids != first[0].token_ids
    assert engine.submit(PROMPT, "lora", **settings).result(60) != engine.submit(PROMPT, "lora", **settings).result(60)
    for other in others:
        other.cancel()


def test_a_greedy_row_beside_sampled_ones_is_greedy(model):
    expected = alone(model, Asked(PROMPT, "lora", 8))
    with Engine(model, SMALL) as engine:
        sampled = [engine.submit(PROMPT, "lora", temperature=3.0, max_new_tokens=8, seed=i) for i in range(3)]
        assert engine.submit(PROMPT, "lora", max_new_tokens=8).result(60).token_ids == expected
        assert len({handle.result(60).token_ids for handle in sampled}) == 3


# How it ends


def test_stop_tokens_and_strings(model):
    tokens = alone(model, Asked(PROMPT, "lora", 12))
    place = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 2)
    with Engine(model, SMALL, decode=lambda ids: "".join(f"<{token}>" for token in ids)) as engine:
        by_token = engine.submit(PROMPT, "lora", max_new_tokens=12, stop_token_ids=[tokens[place]]).result(60)
        assert by_token.token_ids == tokens[: place + 1]
        assert (by_token.finish_reason, by_token.stop) == ("stop", tokens[place])
        text = f"{tokens[place - 1]}><{tokens[place]}"
        by_text = engine.submit(PROMPT, "lora", max_new_tokens=12, stop=["never", text]).result(60)
        assert by_text.token_ids == tokens[: place + 1]
        assert (by_text.finish_reason, by_text.stop) == ("stop", text)
        at_rest(engine)


def test_the_bases_end_of_sequence_ends_unless_ignored():
    model = model_of()
    tokens = alone(model, Asked(PROMPT, "lora", 12))
    model.model.generation_config.eos_token_id = [tokens[4], 0]
    with Engine(model, SMALL) as engine:
        assert (
            engine.submit(PROMPT, "lora", max_new_tokens=12).result(60).token_ids
            == tokens[: tokens.index(tokens[4]) + 1]
        )
        assert engine.submit(PROMPT, "lora", max_new_tokens=12, ignore_eos=True).result(60).token_ids == tokens


def test_stop_strings_need_text(engine):
    with pytest.raises(ConfigError, match=r"decode=tokenizer\.decode"):
        engine.submit(PROMPT, stop="x")


def test_a_cancelled_request_ends_at_once_and_frees_all_that_it_had(engine):
    handles = [engine.submit(PROMPT, "lora", max_new_tokens=40) for _ in range(20)]
    next(iter(handles[0]))
    for handle in handles:
        handle.cancel()
        handle.cancel()
        assert handle.done and handle.result(0).finish_reason == "cancelled"
    assert 1 <= len(handles[0].result().token_ids) < 40
    at_rest(engine)


def test_a_deadline_fails_a_request_running_or_waiting_and_keeps_its_tokens(engine):
    handles = [engine.submit(PROMPT, "lora", max_new_tokens=50, deadline=0.15) for _ in range(60)]
    seen = []
    failed = 0
    for handle in handles:
        try:
            handle.result(10)
        except DeadlineExceededError as error:
            failed += 1
            seen += handle.tokens()
            assert "0.15 s" in str(error)
    assert failed and seen
    at_rest(engine)


# Adapters on demand


@pytest.fixture
def bank(tmp_path):
    base, tenants = family()
    for name, tenant in tenants.items():
        tenant.save_pretrained(tmp_path / "peft" / name)
    folders = {name: tmp_path / "peft" / name for name in tenants}
    return lorakit.export(folders, tmp_path / "bank", base_model=base)


def test_adapters_are_loaded_when_asked_for_and_only_those(bank):
    model = MultiLoraModel(double(), bank)
    with Engine(model, SMALL) as engine:
        assert engine.stats().device.adapters == 0
        engine.submit(PROMPT, "lora", max_new_tokens=2).result(60)
        assert model.pool.keys == [bank["lora"].blake3]
        engine.submit(PROMPT, "dora", max_new_tokens=2).result(60)
        assert engine.stats().device.adapters == 2


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_only(bank):
    model = MultiLoraModel(double(), bank)
    asked = requests(10, [None, "lora", "rslora"], seed=5)
    expected = [alone(model, one) for one in asked]
    model.unload_adapter("dora")
    model.load_adapter("dora")
    model.pool.drop(bank["dora"].blake3)
    entry = bank["dora"]
    with Engine(model, SMALL) as engine:
        read = bank.read_into

        def damaged(asked, buffer):
            if asked.name == "dora":
                raise BankCorruptedError(f"the shard of {asked.name} is cut off")
            return read(asked, buffer)

        bank.read_into = damaged
        bad = [engine.submit(PROMPT, "dora", max_new_tokens=3) for _ in range(5)]
        assert served(engine, asked) == expected
        for handle in bad:
            with pytest.raises(BankCorruptedError, match="dora is cut off"):
                handle.result(60)
        bank.read_into = read
        assert entry.name == "dora"
        engine.submit(PROMPT, "dora", max_new_tokens=3).result(60)
        at_rest(engine)


def test_more_adapters_than_fit_take_turns(bank):
    sizes = [bank[name].nbytes for name in bank.names]
    room = 2 * max(bank[name].nbytes for name in bank.names) + 1024
    assert sum(sizes) > room
    model = MultiLoraModel(double(), bank, adapter_memory=room)
    asked = requests(40, [None, *bank.names], seed=6)
    expected = [alone(model, one) for one in asked]
    with Engine(model, config(patience=0.05)) as engine:
        assert served(engine, asked) == expected
        assert engine.stats().device.nbytes <= room
        at_rest(engine)


def test_a_pinned_adapter_stays_while_others_take_turns(bank):
    room = 2 * max(bank[name].nbytes for name in bank.names) + 1024
    model = MultiLoraModel(double(), bank, adapter_memory=room)
    pinned, *others = bank.names
    with Engine(model, config(patience=0.05)) as engine:
        model.pin_adapter(pinned)
        asked = requests(20, others, seed=7)
        served(engine, asked)
        stats = engine.stats()
        assert model.tiers()[pinned] == "device" and stats.loads.evictions > 0
        # What comes under its name later stays as well.
        bank.remove(pinned)
        bank.add(pinned, bank.path.parent / "peft" / pinned, base_model=model.model)
        engine.submit(PROMPT, pinned, max_new_tokens=2).result(60)
        served(engine, asked)
        assert model.tiers()[pinned] == "device"
        model.unpin_adapter(pinned)
        served(engine, asked)
        assert model.tiers()[pinned] != "device"
        at_rest(engine)


def test_stats_tell_who_runs_and_what_tenants_had(bank):
    model = MultiLoraModel(double(), bank)
    ended = []
    with Engine(model, config(max_requests=2), on_end=ended.append) as engine:
        long = [engine.submit(PROMPT, name, max_new_tokens=50, tenant="t") for name in ("lora", None)]
        for handle in long:
            next(iter(handle))
        waits = engine.submit(PROMPT, "dora", max_new_tokens=3, temperature=1.0, n=2)
        stats = engine.stats()
        assert stats.running == {"lora": 1, None: 1} and stats.waiting == {"dora": 2}
        assert stats.open == 3 and stats.loads.copies == 1 <= stats.loads.reads
        assert stats.tenants["t"].running == 2 and stats.tenants["dora"].waiting == 2
        tokens = stats.tenants["t"].generated_tokens
        waited = time.monotonic() - waits.submitted
        for handle in long:
            handle.cancel()
        assert min(one.queued for one in waits.results(60)) >= waited
        assert 0 < long[0].completion().queued < long[0].completion().times[0]
        found = engine.stats().tenants
        assert found["dora"] == (1, len(PROMPT), 0, 6, 0, 0)
        assert found["t"].requests == 2 and tokens <= found["t"].generated_tokens == sum(h.generated for h in long)
        assert {handle.id for handle in ended} == {handle.id for handle in (*long, waits)} and len(ended) == 3
        at_rest(engine)


def test_an_error_of_the_callers_own_stops_nothing(model):
    def fail(handle):
        raise ValueError("mine")

    with Engine(model, SMALL, on_end=fail) as engine:
        for _ in range(2):
            assert len(engine.submit(PROMPT, max_new_tokens=3).result(60).token_ids) == 3
        assert engine.state == "ready"


def test_an_adapter_that_never_fits_is_refused_and_others_go_on(bank):
    smallest = min(bank.names, key=lambda name: bank[name].nbytes)
    largest = max(bank.names, key=lambda name: bank[name].nbytes)
    model = MultiLoraModel(double(), bank, adapter_memory=bank[largest].nbytes - 256)
    with Engine(model, SMALL) as engine:
        bad = engine.submit(PROMPT, largest, max_new_tokens=2)
        good = engine.submit(PROMPT, smallest, max_new_tokens=2)
        with pytest.raises(PoolFullError, match=largest):
            bad.result(60)
        good.result(60)
        at_rest(engine)


def test_a_popular_adapter_keeps_no_rare_one_out(bank):
    """The popular one always has requests that could run, and its slot is never idle by itself."""
    room = max(bank[name].nbytes for name in bank.names) + 256
    model = MultiLoraModel(double(), bank, adapter_memory=room)
    stop = threading.Event()
    with Engine(model, config(max_requests=3, patience=0.05)) as engine:

        def press():
            while not stop.is_set():
                engine.submit(PROMPT, "lora", max_new_tokens=4, tenant="popular").result(60)

        with ThreadPoolExecutor(6) as threads:
            pressing = [threads.submit(press) for _ in range(6)]
            time.sleep(0.3)
            try:
                engine.submit(PROMPT, "dora", max_new_tokens=4, tenant="rare").result(20)
            finally:
                stop.set()
            for future in pressing:
                future.result(60)


def test_an_adapter_loaded_and_unloaded_while_the_engine_runs(model):
    tenants = family()[1]
    model = MultiLoraModel(double())
    with Engine(model, SMALL) as engine:
        with pytest.raises(AdapterNotFoundError, match="'new'"):
            engine.submit(PROMPT, "new")
        model.load_adapter("new", tenants["dora"])
        running = engine.submit(PROMPT, "new", max_new_tokens=30)
        next(iter(running))
        model.unload_adapter("new")
        with pytest.raises(AdapterNotFoundError):
            engine.submit(PROMPT, "new")
        assert len(running.result(60).token_ids) == 30
        at_rest(engine)
        assert engine.stats().device.adapters == 0 and engine.stats().device.nbytes == 0
    model.load_adapter("again", tenants["dora"])
    assert running.result().token_ids == alone(model, Asked(PROMPT, "again", 30))


# The prefix cache


def cached(engine, prompt, name) -> int:
    return engine.submit(prompt, name, max_new_tokens=1).result(60).cached_tokens


def test_a_prefix_is_shared_among_requests_of_one_adapter_only(engine):
    assert cached(engine, PROMPT, "lora") == 0
    assert cached(engine, PROMPT, "lora") == 8  # two of three blocks: a token must be left to compute
    assert cached(engine, PROMPT, "dora") == 0
    assert cached(engine, PROMPT, None) == 0
    assert cached(engine, PROMPT, None) == 8
    assert cached(engine, (*PROMPT[:4], 99, *PROMPT[4:]), "lora") == 4


def test_alora_rows_share_the_bases_blocks_before_their_invocation(model):
    """Twelve tokens before the invocation are the base's; the block of the invocation is not."""
    prompt = (*PROMPT, *INVOCATION, 30, 31, 32, 33)
    expected = alone(model, Asked(prompt, "alora", 8))
    with Engine(model, SMALL) as engine:
        assert cached(engine, prompt, None) == 0
        assert cached(engine, prompt, "alora") == 12
        assert cached(engine, prompt, "alora") == 16
        assert cached(engine, prompt, None) == 16
        assert cached(engine, prompt, "lora") == 0
        assert engine.submit(prompt, "alora", max_new_tokens=8).result(60).token_ids == expected
    never = (*PROMPT, 30, 31, 32, 33)
    with Engine(model, SMALL) as engine:
        assert cached(engine, never, None) == 0
        assert cached(engine, never, "alora") == 12  # not invoked, it is the base


def test_an_adapter_replaced_under_its_name_never_reads_old_blocks(bank, tmp_path):
    tenants = family()[1]
    model = MultiLoraModel(double(), bank)
    model.load_adapter("local", tenants["rslora"])
    with Engine(model, SMALL) as engine:
        assert [cached(engine, PROMPT, name) for name in ("lora", "lora", "local", "local")] == [0, 8, 0, 8]
        bank.remove("lora")
        bank.add("lora", tmp_path / "peft" / "rslora", base_model=family()[0])
        model.unload_adapter("local")
        model.load_adapter("local", tenants["dora"])
        assert [cached(engine, PROMPT, name) for name in ("lora", "local")] == [0, 0]
        found = served(engine, [Asked(PROMPT, "lora", 8), Asked(PROMPT, "local", 8)])
    assert found == [alone(model, Asked(PROMPT, "rslora", 8)), alone(model, Asked(PROMPT, "dora", 8))]


def test_replacing_leaves_old_requests_their_adapter(bank):
    """Those under way end with the old one, those behind have the new one."""
    tenants = family()[1]
    model = MultiLoraModel(double(), bank)
    with Engine(model, SMALL) as engine:
        running = engine.submit(PROMPT, "lora", max_new_tokens=30)
        next(iter(running))
        with pytest.raises(AdapterExistsError):
            model.load_adapter("lora", tenants["dora"])
        model.load_adapter("lora", tenants["dora"], replace=True)
        behind = engine.submit(PROMPT, "lora", max_new_tokens=8).result(60)
        assert not running.done or len(running.result().token_ids) == 30
        old = running.result(60).token_ids
        at_rest(engine)
        model.unload_adapter("lora")
        with pytest.raises(AdapterNotFoundError):  # nor does the bank's come back
            engine.submit(PROMPT, "lora")
    model.load_adapter("lora")
    assert old == alone(model, Asked(PROMPT, "lora", 30))
    assert behind.token_ids == alone(model, Asked(PROMPT, "dora", 8))


def test_a_salt_keeps_blocks_to_itself(model):
    prompt = (*PROMPT, *INVOCATION, 30, 31, 32, 33)

    def found(name, salt):
        return engine.submit(prompt, name, max_new_tokens=1, cache_salt=salt).result(60).cached_tokens

    with Engine(model, SMALL) as engine:
        for name in (None, "lora"):
            assert [found(name, salt) for salt in ("", "", "a", "a", "b")] == [0, 16, 0, 16, 0]
        assert [found("alora", salt) for salt in ("", "", "a", "a", "c", "c")] == [12, 16, 12, 16, 0, 16]
        assert found(None, "c") == 12  # as far as the adapter had not begun


# Tenants


def test_a_tenants_policy_can_change(model):
    with Engine(model, SMALL) as engine:
        engine.set_tenant("small", TenantPolicy(max_waiting=1))
        with pytest.raises(RequestError, match="max_waiting of tenant 'small'"):
            engine.submit(PROMPT, max_new_tokens=1, temperature=1.0, n=2, tenant="small")
        engine.set_tenant("small", TenantPolicy())
        assert len(engine.submit(PROMPT, max_new_tokens=1, temperature=1.0, n=2, tenant="small").results(60)) == 2
        with pytest.raises(ConfigError, match="TenantPolicy"):
            engine.set_tenant("small", 3)


def test_tenants_take_turns_whatever_they_submit(model):
    with Engine(model, config(max_requests=2, quantum=64)) as engine:
        popular = [engine.submit(PROMPT, "lora", max_new_tokens=8, tenant="popular") for _ in range(30)]
        rare = engine.submit(PROMPT, "lora", max_new_tokens=8, tenant="rare")
        rare.result(60)
        assert sum(handle.done for handle in popular) < 24
        for handle in popular:
            handle.result(60)


def test_caps_of_a_tenant(model):
    tenants = {"small": TenantPolicy(max_running=1, max_waiting=3)}
    with Engine(model, config(tenants=tenants)) as engine:
        admission = engine._batching._chooser
        handles = [engine.submit(PROMPT, "lora", max_new_tokens=8, tenant="small") for _ in range(3)]
        with pytest.raises(EngineBusyError, match="tenant 'small'") as refused:
            for _ in range(3):
                handles.append(engine.submit(PROMPT, "lora", max_new_tokens=8, tenant="small"))
        assert refused.value.retry_after >= 1
        most = 0
        while not all(handle.done for handle in handles):
            most = max(most, len(admission._taken))
            engine.submit(PROMPT, None, max_new_tokens=1, tenant="other").result(60)
        assert most <= 2  # the other tenant's beside its own
        at_rest(engine)


# Refusals


def test_an_engine_that_is_full_refuses_with_a_time(model):
    with Engine(model, config(max_waiting=8)) as engine:
        handles = []
        with pytest.raises(EngineBusyError, match="the engine has as many sequences waiting as it may") as refused:
            for _ in range(200):
                handles.append(engine.submit(PROMPT, "lora", max_new_tokens=30))
        assert 1 <= refused.value.retry_after <= 60
        assert len(handles) >= 8
        for handle in handles:
            handle.cancel()
        at_rest(engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "text"}, "prompt is a str"),
        ({"prompt": [1, VOCAB]}, f"token {VOCAB} at 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 60}, "72, and the model has positions for 64"),
        ({"temperature": -1}, "temperature is -1"),
        ({"n": 2}, "temperature 0 would all be the same"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_are_refused_before_they_wait(engine, settings, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(**{"prompt": PROMPT, **settings})
    at_rest(engine)


def test_a_request_longer_than_the_cache_is_refused(model):
    with Engine(model, config(cache_memory=1)) as engine:
        assert engine.capacity == 4
        with pytest.raises(RequestError, match="key-value cache holds 4"):
            engine.submit([7, 8, 9], max_new_tokens=2)
        assert len(engine.submit([7, 8, 9], max_new_tokens=1).result(60).token_ids) == 1


def test_a_lent_model_is_not_called_otherwise(model, engine):
    with pytest.raises(ModelInUseError, match="served by an engine"):
        model.generate(torch.tensor([PROMPT]), adapter_ids=["lora"])
    with pytest.raises(ModelInUseError), Engine(model, SMALL):
        pass
    engine.close()
    model.generate(torch.tensor([PROMPT]), adapter_ids=["lora"], max_new_tokens=1, pad_token_id=0)


def test_an_engine_runs_once(model):
    engine = Engine(model, SMALL)
    with pytest.raises(EngineStoppedError, match=r"call start\(\)"):
        engine.submit(PROMPT)
    engine.start()
    with pytest.raises(EngineStoppedError, match="started once"):
        engine.start()
    engine.close()
    engine.close()
    with pytest.raises(EngineStoppedError, match="make a new one"):
        engine.submit(PROMPT)
    with pytest.raises(EngineStoppedError, match="started once"):
        engine.start()


# Crashes, and the end


def test_closing_fails_what_is_open_and_returns(model):
    engine = Engine(model, SMALL).start()
    handles = [engine.submit(PROMPT, "lora", max_new_tokens=50) for _ in range(30)]
    next(iter(handles[0]))
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 5
    for handle in handles:
        with pytest.raises(EngineStoppedError, match="was closed"):
            handle.result(1)
    assert not any(thread.name == "lorakit-engine" for thread in threading.enumerate())
    assert not model.pool.held


def test_draining_waits_for_what_is_open(engine):
    handles = [engine.submit(PROMPT, "lora", max_new_tokens=5) for _ in range(12)]
    assert engine.drain(60)
    assert all(handle.done for handle in handles)
    handle = engine.submit(PROMPT, "lora", max_new_tokens=50)
    assert not engine.drain(0.0)
    handle.cancel()


class Broken(RuntimeError):
    pass


def break_once(model, monkeypatch, times=1):
    forward, left = model.model.forward, [times]

    def broken(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise Broken("the device is on fire")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", broken)


def test_a_crash_fails_every_open_request_with_its_cause_and_the_engine_starts_anew(monkeypatch):
    model = model_of()
    expected = alone(model, Asked(PROMPT, "lora", 5))
    with Engine(model, SMALL) as engine:
        handles = [engine.submit(PROMPT, name, max_new_tokens=30) for name in ("lora", None, "dora") * 5]
        next(iter(handles[0]))
        break_once(model, monkeypatch)
        for handle in handles:
            with pytest.raises(EngineCrashedError, match="the device is on fire") as raised:
                handle.result(20)
            assert isinstance(raised.value.__cause__, Broken)
        wait_for(engine, "ready")
        assert engine.submit(PROMPT, "lora", max_new_tokens=5).result(60).token_ids == expected
        at_rest(engine)


def test_what_a_loop_had_is_given_back_when_it_has_failed(monkeypatch):
    """The next one wants the memory; and who asks for the cause holds the frames in which it was raised."""
    model = model_of()
    with Engine(model, SMALL) as engine:
        cache = weakref.ref(engine._batching.batch_processor.cache)
        break_once(model, monkeypatch)
        with pytest.raises(EngineCrashedError) as raised:
            engine.submit(PROMPT, "lora").result(20)
        wait_for(engine, "ready")
        assert cache() is None and raised.value.__cause__.__traceback__ is not None


def test_an_engine_that_crashes_again_and_again_says_that_it_is_dead(monkeypatch):
    model = model_of()
    with Engine(model, config(restarts=1)) as engine:
        break_once(model, monkeypatch, times=2)
        for state in ("ready", "dead"):
            with pytest.raises(EngineCrashedError, match="on fire"):
                engine.submit(PROMPT, "lora").result(20)
            wait_for(engine, state)
        with pytest.raises(EngineCrashedError, match=r"the engine is down: .*on fire") as raised:
            engine.submit(PROMPT)
        assert isinstance(raised.value.__cause__, Broken)
        assert engine.stats().state == "dead"


def test_a_start_that_fails_gives_the_model_back(model, monkeypatch):
    monkeypatch.setattr("lorakit.engine.batching.Cache.__init__", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Engine(model, SMALL).start()
    monkeypatch.undo()
    alone(model, Asked(PROMPT, "lora", 1))
    with Engine(model, SMALL) as engine:
        engine.submit(PROMPT, "lora", max_new_tokens=1).result(60)


def test_requests_from_many_threads(model):
    asked = requests(60, [None, *family()[1]], seed=8)
    expected = [alone(model, one) for one in asked]
    with Engine(model, SMALL) as engine, ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda one: served(engine, [one])[0], asked)
        assert list(found) == expected
        at_rest(engine)
