"""64 connections over 32 tenants, with cancels and disconnects: nothing fails that was not asked to, nothing leaks.

`LORAKIT_LOAD_SECONDS=60` runs it for as long as a release wants; `make load` does.
"""

import asyncio
import gc
import os
import random
import time
from collections import Counter

import httpx
import psutil
import pytest
from loopback import BASE, serving, until
from speaking import tenant_of

import lorakit
from lorakit.server.access import Access
from lorakit.server.accounts import Account, Accounts

SECONDS = float(os.environ.get("LORAKIT_LOAD_SECONDS", "6"))
CONNECTIONS, TENANTS = 64, 32
ADMIN = "an-administrators-key"

ASKED_FOR = {
    "whole": {200},
    "stream": {200},
    "disconnect": {200},
    "other's": {404},
    "mistake": {400},
    "wrong key": {401},
    "models": {200},
    "metrics": {200},
    "quota": {429},
}
"""What each kind of call may be answered with; 429 is any busy engine's too."""


@pytest.fixture(scope="module")
def app(base, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    names = [f"tenant-{number}" for number in range(TENANTS)]
    for seed in range(4):  # contents; names share them
        tenant_of(base, seed).save_pretrained(folder / f"peft-{seed}")
    sources = {name: folder / f"peft-{number % 4}" for number, name in enumerate(names)}
    bank = lorakit.export(sources, folder / "bank", base_model=base)
    accounts = Accounts(folder / "tenants.db", create=True)
    accounts.add(Account("broke", tokens_per_day=1))
    for name in names:
        accounts.add(Account(name))
        accounts.grant(name, [name])
    with serving(base, {}, tokenizer, bank=bank, access=Access(accounts, admin_key=ADMIN)) as app:
        app.keys = {name: accounts.new_key(name).text for name in (*names, "broke")}
        app.accounts = accounts
        yield app
    accounts.close()


async def call(http, app, rng, told):
    """One call of a random kind."""
    who = f"tenant-{rng.randrange(TENANTS)}"
    kind = rng.choices(list(ASKED_FOR), weights=[30, 30, 20, 3, 3, 3, 3, 1, 2])[0]
    headers = {"Authorization": f"Bearer {app.keys[who]}"}
    body = {
        "model": rng.choice([who, BASE]),
        "prompt": f"{rng.random()} " * rng.randrange(1, 8),
        "max_tokens": rng.randrange(1, 24),
        "temperature": rng.choice([0, 1]),
        "ignore_eos": True,
    }
    if kind in ("models", "metrics"):
        headers = {"Authorization": f"Bearer {ADMIN}"} if kind == "metrics" else headers
        answer = await http.get("/metrics" if kind == "metrics" else "/v1/models", headers=headers)
        status = answer.status_code
    elif kind in ("stream", "disconnect"):
        body |= {"stream": True, "max_tokens": 200 if kind == "disconnect" else body["max_tokens"]}
        async with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            status, lines = answer.status_code, 0
            async for line in answer.aiter_lines():
                lines += bool(line)
                if kind == "disconnect" and lines == 3:
                    break
            if kind == "stream" and status == 200:
                assert line == "" and lines > 1, "it ended before its last event"
    else:
        if kind == "other's":
            body["model"] = f"tenant-{(int(who.split('-')[1]) + 1) % TENANTS}"
        elif kind == "mistake":
            body["temperature"] = 99
        elif kind == "wrong key":
            headers = {"Authorization": "Bearer lk-0-0"}
        elif kind == "quota":
            headers, body["model"] = {"Authorization": f"Bearer {app.keys['broke']}"}, BASE
        answer = await http.post("/v1/completions", json=body, headers=headers)
        status = answer.status_code
    assert status in ASKED_FOR[kind] | ({429} if kind in ("whole", "stream", "disconnect") else set()), (kind, status)
    told[kind, status] += 1


async def load(app, seconds):
    """Answers by kind and status."""
    told, end = Counter(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)

    async def one(seed):
        rng = random.Random(seed)
        while time.monotonic() < end:
            await call(http, app, rng, told)

    async with httpx.AsyncClient(base_url=app.url, limits=limits, timeout=60) as http:
        await asyncio.gather(*(one(seed) for seed in range(CONNECTIONS)))
    return told


@pytest.mark.long
def test_a_server_under_load(app):
    engine, process = app.served.engine, psutil.Process()

    def at_rest():
        stats = engine.stats()
        return not stats.open and stats.cache_free == 1.0 and not engine.model.pool.held

    first = asyncio.run(load(app, min(5, SECONDS / 2)))  # allocators and caches have what they want
    until(at_rest)
    gc.collect()
    memory, threads, files = process.memory_info().rss, process.num_threads(), process.num_fds()
    told = asyncio.run(load(app, SECONDS))
    until(at_rest)
    gc.collect()
    grown = process.memory_info().rss - memory
    print(f"{sum(told.values())} calls in {SECONDS:.0f} s, {grown / 1e6:+.1f} MB, {dict(told)}")
    assert sum(told.values()) > CONNECTIONS
    assert {kind for kind, _ in told} == set(ASKED_FOR) or SECONDS < 30
    assert engine.state == "ready" and grown < 64e6
    until(lambda: process.num_threads() <= threads + 4 and process.num_fds() <= files + 4)
    # Each request that was taken is in somebody's usage, those that were left too.
    taken = sum(
        count
        for (kind, status), count in (first + told).items()
        if kind in ("whole", "stream", "disconnect") and status == 200
    )
    until(lambda: sum(one.requests for one in app.accounts.usage()) == taken)
