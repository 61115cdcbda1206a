"""Thousands of requests with all that can happen to them: none lost, none hung, nothing leaked, each answer right."""

import dataclasses
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from architectures import ARCHITECTURES, METHODS, adapt
from served import SMALL, alone, double, family, requests

import lorakit
from lorakit import Engine, MultiLoraModel
from lorakit.errors import AdapterNotFoundError, BankCorruptedError, DeadlineExceededError, EngineBusyError

REQUESTS = int(os.environ.get("LORAKIT_SOAK", "1200"))
"""The whole soak has 10,000; CI's fewer."""
KINDS = 120
"""Different requests: what each gives alone is known before."""
THREADS = 24


class Soak:
    """An engine's callers, and what became of their requests.

    Attributes:
        engine: the engine.
        expected: request → the answers that are right.
        ended: how many ended in which way.
    """

    def __init__(self, engine, expected):
        self.engine = engine
        self.expected = expected
        self.ended = Counter()
        self._kinds = list(expected)
        self._lock = threading.Lock()

    def call(self, seed, count):
        """Serves so many requests, one after the other."""
        rng = random.Random(seed)
        for _ in range(count):
            asked = rng.choice(self._kinds)
            try:
                end = self._serve(asked, rng)
            except DeadlineExceededError:
                end = "late"
            except BankCorruptedError:
                assert asked.adapter == "broken"
                end = "broken"
            except AdapterNotFoundError:
                assert asked.adapter == "turn"
                end = "unloaded"
            with self._lock:
                self.ended[end] += 1

    def _serve(self, asked, rng):
        chance = rng.random()
        handle = self._submit(asked, deadline=0.02 if chance < 0.05 else None)
        if 0.05 <= chance < 0.12:
            if rng.random() < 0.5:
                next(iter(handle), None)
            handle.cancel()
        completion = handle.result(300)
        answers = self.expected[asked]
        if completion.finish_reason == "cancelled":
            assert any(answer[: len(completion.token_ids)] == completion.token_ids for answer in answers)
            return "cancelled"
        assert completion.token_ids in answers, (asked, completion, answers)
        return "right"

    def _submit(self, asked, **settings):
        while True:
            try:
                return self.engine.submit(asked.prompt, asked.adapter, max_new_tokens=asked.tokens, **settings)
            except EngineBusyError:
                time.sleep(0.002)


def test_soak(tmp_path, monkeypatch):
    base, tenants = family()
    for name, tenant in tenants.items():
        tenant.save_pretrained(tmp_path / name)
    # Two contents that take turns under one name, and one whose file breaks.
    for number in (0, 1):
        adapt(base, 20 + number, **METHODS["lora"](ARCHITECTURES["llama"])).save_pretrained(tmp_path / f"turn{number}")
    folders = {name: tmp_path / name for name in tenants} | {"broken": tmp_path / "turn1"}
    bank = lorakit.export(folders, tmp_path / "bank", base_model=base)
    room = 3 * max(bank[name].nbytes for name in bank.names)
    model = MultiLoraModel(double(), bank, adapter_memory=room)

    kinds = requests(KINDS, [None, *tenants], seed=1)
    expected = {asked: [alone(model, asked)] for asked in kinds}
    turns = [asked._replace(adapter="turn") for asked in kinds[:16]]
    for number in (0, 1):
        model.load_adapter("turn", tmp_path / f"turn{number}")
        for asked in turns:
            expected.setdefault(asked, []).append(alone(model, asked))
        model.unload_adapter("turn")
    expected |= {asked._replace(adapter="broken"): [()] for asked in kinds[16:20]}

    read = bank.read_into

    def read_into(entry, buffer):
        if entry.name == "broken":
            raise BankCorruptedError("the shard of broken is cut off")
        return read(entry, buffer)

    monkeypatch.setattr(bank, "read_into", read_into)

    def take_turns(stop):
        number = 0
        while not stop.wait(0.05):
            model.load_adapter("turn", tmp_path / f"turn{number % 2}")
            stop.wait(0.2)
            model.unload_adapter("turn")
            number += 1

    config = dataclasses.replace(SMALL, max_requests=16, max_batch_tokens=64, patience=0.05, max_waiting=64)
    stop = threading.Event()
    with Engine(model, config) as engine, ThreadPoolExecutor(THREADS + 1) as threads:
        soak = Soak(engine, expected)
        calling = [threads.submit(soak.call, seed, REQUESTS // THREADS) for seed in range(THREADS)]
        turning = threads.submit(take_turns, stop)
        try:
            for caller in calling:
                caller.result(900)
        finally:
            stop.set()
        turning.result(30)
        assert soak.ended.total() == REQUESTS // THREADS * THREADS
        assert set(soak.ended) == {"right", "cancelled", "late", "broken", "unloaded"}, soak.ended
        scheduler = engine._batching.batch_processor.scheduler
        end = time.monotonic() + 5
        while (scheduler.active_requests or model.pool.held) and time.monotonic() < end:
            time.sleep(0.01)
        stats = engine.stats()
        assert (stats.open, stats.waiting, stats.cache_free) == (0, {}, 1.0)
        assert not model.pool.held and not scheduler.waiting_requests and not scheduler.cache.owners
        assert stats.device.nbytes <= room
