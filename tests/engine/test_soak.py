"""Thousands of requests with all that can happen to them: none lost, none hung, nothing leaked, each answer right."""

import dataclasses
import os
import random
import threading
import time

import pytest
import torch
from architectures import METHODS, ARCHITECTURES, adapt
from served import SMALL, Asked, alone, double, family, requests

import lorakit
from lorakit import Engine, MultiLoraModel
from lorakit.errors import (
    AdapterNotFoundError,
    BankCorruptedError,
    DeadlineExceededError,
    EngineBusyError,
    PoolFullError,
)

REQUESTS = int(os.environ.get("LORAKIT_SOAK", "1500"))
"""The full soak has 10,000; CI's has fewer."""
KINDS = 120
"""Different requests: what each gives alone is known before."""


def test_soak(tmp_path):
    base, tenants = family()
    folders = {}
    for name, tenant in tenants.items():
        tenant.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    # Two contents that take turns under one name, and a file that breaks.
    for number in (0, 1):
        adapt(base, 20 + number, **METHODS["lora"](ARCHITECTURES["llama"])).save_pretrained(tmp_path / f"turn{number}")
    folders |= {"broken": tmp_path / "turn1"}
    bank = lorakit.export(folders, tmp_path / "bank", base_model=base)
    turns = [lorakit.export({"turn": tmp_path / f"turn{n}"}, tmp_path / f"bank{n}", base_model=base) for n in (0, 1)]
    room = 3 * max(bank[name].nbytes for name in bank.names)
    model = MultiLoraModel(double(), bank, adapter_memory=room)
    rng = random.Random(0)
    kinds = requests(KINDS, [None, *tenants], seed=1)
    expected = {asked: alone(model, asked) for asked in kinds}
    turn = [asked._replace(adapter="turn") for asked in kinds[:10]]
    by_turn = []
    for one in turns:
        served_by = MultiLoraModel(double(), one)
        by_turn.append({asked: alone(served_by, asked) for asked in turn})

    read = bank.read_into

    def read_into(name, buffer):
        if name == "broken":
            raise BankCorruptedError("the shard of broken is cut off")
        return read(name, buffer)

    bank.read_into = read_into
    config = dataclasses.replace(SMALL, max_requests=16, max_batch_tokens=64, patience=0.05, max_waiting=64)
    ended = {"right": 0, "cancelled": 0, "late": 0, "broken": 0, "unloaded": 0}
    lock = threading.Lock()
    problems = []

    def count(what):
        with lock:
            ended[what] += 1

    def submit(engine, *args, **settings):
        while True:
            try:
                return engine.submit(*args, **settings)
            except EngineBusyError:
                time.sleep(0.002)

    def serve(engine, asked, answers, rng):
        what = rng.random()
        deadline = 0.02 if what < 0.05 else None
        try:
            handle = submit(engine, asked.prompt, asked.adapter, max_new_tokens=asked.tokens, deadline=deadline)
            if 0.05 <= what < 0.12:
                if rng.random() < 0.5:
                    next(iter(handle), None)
                handle.cancel()
            completion = handle.result(120)
        except DeadlineExceededError:
            return count("late")
        except BankCorruptedError:
            assert asked.adapter == "broken"
            return count("broken")
        except AdapterNotFoundError:
            assert asked.adapter in ("turn", "local")
            return count("unloaded")
        if completion.finish_reason == "cancelled":
            assert any(answer[: len(completion.token_ids)] == completion.token_ids for answer in answers)
            return count("cancelled")
        assert completion.token_ids in answers, (asked, completion, answers)
        return count("right")

    def work(engine, seed, share):
        rng = random.Random(seed)
        try:
            for _ in range(share):
                pick = rng.random()
                if pick < 0.03:
                    asked = rng.choice(kinds)._replace(adapter="broken")
                    serve(engine, asked, [expected[rng.choice(kinds)]] if False else [()], rng)
                elif pick < 0.15:
                    asked = rng.choice(turn)
                    serve(engine, asked, [answers[asked] for answers in by_turn], rng)
                else:
                    asked = rng.choice(kinds)
                    serve(engine, asked, [expected[asked]], rng)
        except BaseException as error:
            problems.append(error)

    def take_turns(stop):
        number = 0
        while not stop.wait(0.05):
            source = tmp_path / f"turn{number % 2}"
            try:
                model.load_adapter("turn", source)
                stop.wait(0.2)
                model.unload_adapter("turn")
            except BaseException as error:
                problems.append(error)
                return
            number += 1

    stop = threading.Event()
    with Engine(model, config) as engine:
        workers = [threading.Thread(target=work, args=(engine, seed, REQUESTS // 24)) for seed in range(24)]
        turner = threading.Thread(target=take_turns, args=(stop,))
        for thread in (*workers, turner):
            thread.start()
        for thread in workers:
            thread.join(600)
            assert not thread.is_alive(), "a request hangs"
        stop.set()
        turner.join(30)
        assert not problems, problems[0]
        assert sum(ended.values()) == REQUESTS // 24 * 24
        assert all(ended.values()), ended
        # Nothing is left behind.
        end = time.monotonic() + 5
        scheduler = engine._batching.batch_processor.scheduler
        while time.monotonic() < end and (scheduler.active_requests or model.pool.held):
            time.sleep(0.01)
        stats = engine.stats()
        assert (stats.open, stats.waiting, stats.cache_free) == (0, 0, 1.0)
        assert not model.pool.held and not scheduler.waiting_requests and not scheduler.cache.owners
        assert stats.adapter_bytes <= room
    assert threading.active_count() < 20
