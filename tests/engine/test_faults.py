"""What users, files and threads can do to an engine: it ends every request, and nobody else's is touched."""

import copy
import itertools
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from architectures import VOCAB
from peft import LoraConfig, get_peft_model
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
    served,
    wait_for,
)

import lorakit
from lorakit import Engine, MultiLoraModel
from lorakit.engine.batching import blocks_in
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import (
    AdapterNotFoundError,
    BankCorruptedError,
    EngineBusyError,
    EngineCrashedError,
    EngineStoppedError,
    LorakitError,
    RequestError,
)


def cache_of(blocks: int, model) -> int:
    """Bytes of a cache of so many blocks."""
    size = 1
    while blocks_in(size, model.model, 4, 24) < 2:
        size += 64
    return size * blocks // 2 + 64


# The cache


def test_an_invocation_that_only_ends_in_the_next_block_is_another_content(model):
    """Both prompts' first blocks are [5, 6, 9, 5]; alora acts on it from 0 on in one, from 3 on in the other."""
    early, late = (5, 6, 9, 5, 7, 30, 31, 32), (5, 6, 9, 5, 6, 30, 31, 32)
    expected = [alone(model, Asked(prompt, "alora", 8)) for prompt in (early, late, early)]
    with Engine(model, SMALL) as engine:
        found = [engine.submit(prompt, "alora", max_new_tokens=8).result(60) for prompt in (early, late, early)]
    assert [one.cached_tokens for one in found] == [0, 0, 4]
    assert [one.token_ids for one in found] == expected


def test_what_waits_runs_when_those_that_threw_it_out_are_cancelled(model):
    with Engine(model, config(cache_memory=cache_of(8, model))) as engine:
        processor = engine._batching.batch_processor
        update = processor.update_batch
        handles, thrown_out = {}, []

        def update_and_cancel():
            update()
            if processor.scheduler.block_new_requests and not thrown_out:
                thrown_out.extend(processor.scheduler.waiting_requests)
                for name in processor.scheduler.active_requests:
                    handles[name].cancel()

        processor.update_batch = update_and_cancel
        for i in range(5):
            handle = engine.submit([9 + i] * 6, "lora", max_new_tokens=18, ignore_eos=True)
            handles[handle.id] = handle
        reasons = [handle.result(20).finish_reason for handle in handles.values()]
        assert thrown_out and set(reasons) == {"cancelled", "length"}
        at_rest(engine)


def test_cached_tokens_are_of_the_prompt_alone(model):
    """Also for a request that was thrown out, and found its own blocks again."""
    with Engine(model, config(cache_memory=cache_of(9, model))) as engine:
        handles = [engine.submit([9 + i % 2] * 6, "lora", max_new_tokens=20, ignore_eos=True) for i in range(12)]
        found = [handle.result(60).cached_tokens for handle in handles]
    assert max(found) <= 6


# The loop


class Leave(BaseException):
    pass


def test_what_is_no_exception_ends_no_request_silently(monkeypatch):
    """SystemExit, asyncio's CancelledError: BaseExceptions that transformers' loop does not catch."""
    model = model_of()
    expected = alone(model, Asked(PROMPT, "lora", 5))
    with Engine(model, SMALL) as engine:
        handle = engine.submit(PROMPT, "lora", max_new_tokens=40)
        next(iter(handle))
        forward = model.model.forward

        def leave(*args, **kwargs):
            monkeypatch.setattr(model.model, "forward", forward)
            raise Leave("out")

        monkeypatch.setattr(model.model, "forward", leave)
        with pytest.raises(EngineCrashedError, match="Leave: out"):
            handle.result(10)
        wait_for(engine, "ready")
        assert engine.submit(PROMPT, "lora", max_new_tokens=5).result(60).token_ids == expected
        at_rest(engine)


def test_closing_does_not_wait_for_a_step_that_hangs(monkeypatch):
    model = model_of()
    engine = Engine(model, config(stop_timeout=0.2)).start()
    forward, go_on, inside = model.model.forward, threading.Event(), threading.Event()

    def hang(*args, **kwargs):
        inside.set()
        go_on.wait(30)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", hang)
    handle = engine.submit(PROMPT, "lora", max_new_tokens=5)
    assert inside.wait(10)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(5)
    hung = closing.is_alive()
    with pytest.raises(EngineStoppedError):
        handle.result(1)
    # The step still reads the adapter and runs the base.
    assert model.pool.held and model._lent
    go_on.set()
    assert not hung
    end = time.monotonic() + 10
    while model._lent and time.monotonic() < end:
        time.sleep(0.01)
    assert not model._lent and not model.pool.held
    with Engine(model, SMALL) as again:
        again.submit(PROMPT, "lora", max_new_tokens=1).result(30)


def test_an_engine_closed_by_its_own_decode(model):
    engine = Engine(model, SMALL, decode=lambda ids: engine.close() or "x").start()
    handle = engine.submit(PROMPT, "lora", max_new_tokens=5, stop="y")
    with pytest.raises(EngineStoppedError):
        handle.result(10)
    end = time.monotonic() + 10
    while model._lent and time.monotonic() < end:
        time.sleep(0.01)
    assert not model._lent and not model.pool.held


def test_submitting_from_within_a_decode(model):
    more = []

    def decode(ids):
        if len(more) < 3:
            more.append(engine.submit(PROMPT, None, max_new_tokens=2))
        return "x"

    with Engine(model, SMALL, decode=decode) as engine:
        engine.submit(PROMPT, "lora", max_new_tokens=5, stop="y").result(10)
        assert [len(handle.result(10).token_ids) for handle in more] == [2, 2, 2]


# Requests that cannot be


@pytest.mark.parametrize("settings", [{"max_waiting": 2}, {"default_tenant": TenantPolicy(max_waiting=2)}], ids=str)
def test_more_sequences_than_may_ever_wait_are_refused_for_good(model, settings):
    with Engine(model, config(**settings)) as engine:
        with pytest.raises(RequestError, match=r"n=3 .*max_waiting.* 2"):
            engine.submit(PROMPT, temperature=1.0, n=3)
        with pytest.raises(RequestError):
            engine.generate([PROMPT], temperature=1.0, n=3, progress=False)
        at_rest(engine)


@pytest.mark.parametrize("name", [["lora"], 5, {}, "", b"lora"], ids=str)
def test_an_adapter_id_of_any_kind(model, name):
    with Engine(model, SMALL) as engine, pytest.raises(AdapterNotFoundError):
        engine.submit(PROMPT, name)


def test_prompts_from_a_generator(model):
    with Engine(model, SMALL) as engine:
        found = engine.generate((PROMPT for _ in range(3)), "lora", max_new_tokens=2, progress=False)
        assert len(found) == 3


def test_draining_waits_for_what_comes_meanwhile(model):
    with Engine(model, SMALL) as engine:
        late = []
        first = engine.submit(PROMPT, "lora", max_new_tokens=40, ignore_eos=True)

        def submit():
            next(iter(first))
            late.append(engine.submit(PROMPT, "dora", max_new_tokens=50, ignore_eos=True))

        thread = threading.Thread(target=submit)
        thread.start()
        assert engine.drain(60)
        thread.join()
        assert late[0].done


def test_the_ended_are_forgotten_before_their_deadlines(model):
    with Engine(model, config(max_batch_tokens=64)) as engine:
        for _ in range(40):
            handles = [engine.submit(PROMPT, max_new_tokens=1, deadline=1e6) for _ in range(10)]
            for handle in handles:
                handle.result(60)
        at_rest(engine)
        assert len(engine._batching._chooser._deadlines) <= 100


# Adapters


def adding(invocation=None, added=3, seed=1):
    """An adapter that adds tokens to the vocabulary."""
    base = copy.deepcopy(family()[0])
    base.resize_token_embeddings(VOCAB + added, mean_resizing=False)
    saved = LoraConfig(
        target_modules=["q_proj"],
        r=4,
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
        alora_invocation_tokens=invocation,
    )
    model = get_peft_model(base, saved).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_tokens_that_adapters_add_beside_rows_that_have_none(model):
    model = model_of()
    model.load_adapter("three", adding())
    model.load_adapter("seven", adding(added=7, seed=2))
    model.load_adapter("invoked", adding(INVOCATION, seed=3))
    three, seven = (VOCAB, VOCAB + 2), (VOCAB + 6, VOCAB + 1)
    asked = [
        asked
        for count in range(1, 6)
        for asked in (
            Asked((9, *three) * count, "three", 8),
            Asked((*seven, 10) * count, "seven", 8),
            Asked((11, *INVOCATION, *three), "invoked", 8),
            Asked(PROMPT[:count], "lora", 8),
            Asked(PROMPT[:count], None, 8),
        )
    ]
    expected = [alone(model, one) for one in asked]
    assert any(token >= VOCAB for tokens in expected for token in tokens)
    limits = {"three": VOCAB + 3, "seven": VOCAB + 7, "invoked": VOCAB + 3}
    with Engine(model, SMALL) as engine:
        assert served(engine, asked) == expected
        drawn = [engine.submit(one.prompt, one.adapter, temperature=50.0, max_new_tokens=20, n=2) for one in asked]
        for one, handle in zip(asked, drawn, strict=True):
            for completion in handle.results(60):
                assert max(completion.token_ids) < limits.get(one.adapter, VOCAB)
        at_rest(engine)


def test_a_token_that_the_base_lacks_where_the_adapter_does_not_act_is_refused():
    """It would be looked up in the base's embedding: an error of the step, and the end of the loop."""
    model = model_of()
    model.load_adapter("invoked", adding(INVOCATION))
    with Engine(model, SMALL) as engine:
        for prompt in ([9, VOCAB, 10], [9, VOCAB, *INVOCATION, 10]):
            with pytest.raises(RequestError, match=f"token {VOCAB} at 1, which adapter 'invoked' adds"):
                engine.submit(prompt, "invoked")
        engine.submit([9, *INVOCATION, VOCAB], "invoked", max_new_tokens=2).result(20)
        assert engine.state == "ready"


def test_an_adapter_replaced_by_one_with_fewer_tokens_fails_its_own_requests_only():
    model = model_of()
    model.load_adapter("new", adding())
    with Engine(model, config(max_requests=1)) as engine:
        running = engine.submit(PROMPT, None, max_new_tokens=50, ignore_eos=True)
        waiting = engine.submit([9, VOCAB + 1, 10], "new", max_new_tokens=2)
        model.unload_adapter("new")
        model.load_adapter("new", family()[1]["lora"])
        with pytest.raises(RequestError, match=f"token {VOCAB + 1} at 1.*replaced"):
            waiting.result(20)
        assert len(running.result(20).token_ids) == 50 and engine.state == "ready"
        at_rest(engine)


def banked(tmp_path):
    base, tenants = family()
    for name, tenant in tenants.items():
        tenant.save_pretrained(tmp_path / "peft" / name)
    return lorakit.export({name: tmp_path / "peft" / name for name in tenants}, tmp_path / "bank", base_model=base)


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A bank whose adapter dora is read when the gate is opened, the names that were read, and the gate."""
    bank, names, gate = banked(tmp_path), [], threading.Event()

    def slowly(entry, buffer, read=bank.read_into):
        names.append(entry.name)
        if entry.name == "dora":
            gate.wait(60)
        return read(entry, buffer)

    monkeypatch.setattr(bank, "read_into", slowly)
    return bank, names, gate


def test_a_slow_adapter_keeps_no_other_waiting(slow):
    """However many requests for it came before: they do not fill the places of those that could run."""
    bank, read, gate = slow
    model = MultiLoraModel(double(), bank)
    with Engine(model, config(default_tenant=TenantPolicy())) as engine:
        slowed = [engine.submit(PROMPT, "dora", max_new_tokens=2) for _ in range(60)]
        others = [engine.submit(PROMPT, name, max_new_tokens=2) for name in (None, "lora", "rslora")]
        for other in others:
            other.result(20)
        assert not any(handle.done for handle in slowed)
        gate.set()
        for handle in slowed:
            handle.result(60)
        assert read.count("dora") == 1
        at_rest(engine)


def test_an_adapter_taken_out_while_it_is_read(slow):
    bank, _, gate = slow
    model = MultiLoraModel(double(), bank)
    with Engine(model, SMALL) as engine:
        handles = [engine.submit(PROMPT, "dora", max_new_tokens=2) for _ in range(20)]
        time.sleep(0.2)
        model.unload_adapter("dora")
        gate.set()
        for handle in handles:
            with pytest.raises(AdapterNotFoundError, match="dora"):
                handle.result(20)
        engine.submit(PROMPT, "lora", max_new_tokens=2).result(20)
        at_rest(engine)
        assert model.pool.keys == [bank["lora"].blake3]


def test_a_request_of_many_sequences_fails_once(tmp_path, monkeypatch):
    """Its others neither read the adapter again nor run."""
    bank, reads = banked(tmp_path), []

    def broken(entry, buffer):
        reads.append(entry.name)
        raise BankCorruptedError("cut off")

    monkeypatch.setattr(bank, "read_into", broken)
    model = MultiLoraModel(double(), bank)
    with Engine(model, SMALL) as engine:
        handle = engine.submit(PROMPT, "lora", temperature=1.0, n=128, max_new_tokens=5)
        with pytest.raises(BankCorruptedError):
            handle.result(20)
        at_rest(engine)
        assert len(reads) < 5


# Threads


@pytest.fixture
def switching():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("seed", range(2))
def test_an_engine_that_crashes_and_is_closed_beneath_its_callers(seed, switching, monkeypatch):
    """Every handle ends, every call returns, and the model is whole."""
    model = model_of()
    rng = random.Random(seed)
    forward, ends, stop, steps = model.model.forward, Counter(), threading.Event(), itertools.count()

    def unreliable(*args, **kwargs):
        if next(steps) % 12 == 11:
            raise (OSError, Leave)[rng.randrange(2)]("broken")
        return forward(*args, **kwargs)

    engine = Engine(model, config(restarts=1000)).start()
    monkeypatch.setattr(model.model, "forward", unreliable)

    def call(number):
        rng = random.Random(number)
        while not stop.is_set():
            try:
                name = rng.choice([None, "lora", "dora", "alora", "turn"])
                handle = engine.submit(
                    PROMPT[: rng.randint(1, 12)],
                    name,
                    max_new_tokens=rng.randint(1, 10),
                    n=rng.choice([1, 1, 3]),
                    temperature=1.0,
                    deadline=rng.choice([None, None, 0.02]),
                )
                if rng.random() < 0.2:
                    handle.cancel()
                ends[handle.result(30).finish_reason] += 1
            except LorakitError as error:
                ends[type(error).__name__] += 1
                if isinstance(error, EngineBusyError):
                    time.sleep(0.01)
                if isinstance(error, EngineStoppedError):
                    return

    def turn():
        while not stop.is_set():
            model.load_adapter("turn", family()[1]["rslora"])
            engine.stats()
            model.unload_adapter("turn")
            time.sleep(0.05)

    with ThreadPoolExecutor(10) as threads:
        calling = [threads.submit(call, number) for number in range(8)] + [threads.submit(turn)]
        time.sleep(4)
        engine.close()
        assert engine.state == "closed"
        time.sleep(0.1)
        stop.set()
        for caller in calling:
            caller.result(40)
    assert ends["EngineCrashedError"] and ends["EngineStoppedError"] and ends["length"], ends
    assert not model.pool.held and not engine.stats().open and not engine.stats().waiting and not model._lent
    admission = engine._chooser
    assert not admission._taken and not engine._tenants._running
    monkeypatch.setattr(model.model, "forward", forward)
    with Engine(model, SMALL) as again:
        again.submit(PROMPT, "lora", max_new_tokens=1).result(20)


def test_one_prompt_that_cannot_be_is_told_of_before_any_is_served(model):
    with Engine(model, SMALL) as engine:
        with pytest.raises(RequestError):
            engine.generate([[11, 12], [13], []], max_new_tokens=3, progress=False)
        with pytest.raises(TypeError, match="max_tokens"):
            engine.generate([[11, 12]], max_tokens=3, progress=False)
        assert engine.stats().steps == 0
