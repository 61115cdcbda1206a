"""A bank that changes while an engine serves it: nothing is lost, and no old content comes under a new name."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import PROMPT, SMALL, Asked, alone, at_rest, double, family, requests

import lorakit
from lorakit import Engine, MultiLoraModel
from lorakit.adapters.layout import Extent
from lorakit.errors import AdapterNotFoundError


@pytest.fixture
def folders(tmp_path):
    tenants = family()[1]
    for name, tenant in tenants.items():
        tenant.save_pretrained(tmp_path / "peft" / name)
    return {name: tmp_path / "peft" / name for name in tenants}


@pytest.fixture
def bank(tmp_path, folders):
    return lorakit.export(folders, tmp_path / "bank", base_model=family()[0])


def replace(bank, name, folder):
    bank.add(name, folder, base_model=family()[0], overwrite=True)


# Memory


def test_what_was_removed_or_replaced_in_the_bank_leaves_the_memory(bank, folders):
    model = MultiLoraModel(double(), bank)
    keys = {name: bank[name].blake3 for name in bank.names}
    with Engine(model, SMALL) as engine:
        for name in ("lora", "dora", "rslora"):
            engine.submit(PROMPT, name, max_new_tokens=2).result(60)
        assert set(model.pool.keys) == {keys["lora"], keys["dora"], keys["rslora"]}
        bank.remove("dora")
        replace(bank, "lora", folders["alora"])
        engine.submit(PROMPT, max_new_tokens=2).result(60)  # any step sees it
        assert model.pool.keys == [keys["rslora"]]
        assert engine.stats().device.nbytes == model.pool.get(keys["rslora"]).nbytes
        at_rest(engine)


def test_a_request_under_way_keeps_what_it_began_with(bank, folders):
    model = MultiLoraModel(double(), bank)
    expected = alone(model, Asked(PROMPT, "lora", 40))
    with Engine(model, SMALL) as engine:
        running = engine.submit(PROMPT, "lora", max_new_tokens=40)
        next(iter(running))
        replace(bank, "lora", folders["dora"])
        bank.compact()
        later = engine.submit(PROMPT, "lora", max_new_tokens=40)
        assert running.result(60).token_ids == expected
        found = later.result(60).token_ids
        at_rest(engine)
        assert model.pool.keys == [bank["lora"].blake3]
    assert found == alone(model, Asked(PROMPT, "dora", 40)) != expected


def test_a_bank_that_stays_is_looked_at_once(bank, monkeypatch):
    model = MultiLoraModel(double(), bank)
    looked = []
    monkeypatch.setattr(model.pool, "keep_only", looked.append)
    with Engine(model, SMALL) as engine:
        engine.submit(PROMPT, "lora", max_new_tokens=20).result(60)
        assert not looked
        bank.reload()
        engine.submit(PROMPT, "lora", max_new_tokens=20).result(60)
        assert len(looked) == 1


# Reading


def test_an_adapter_that_is_loaded_ahead_stops_nobody(bank, monkeypatch):
    model, gate, reading = MultiLoraModel(double(), bank), threading.Event(), threading.Event()

    def slowly(entry, buffer, read=bank.read_into):
        if entry.name == "dora":
            reading.set()
            assert gate.wait(60)
        return read(entry, buffer)

    monkeypatch.setattr(bank, "read_into", slowly)
    with Engine(model, SMALL) as engine, ThreadPoolExecutor(1) as threads:
        loading = threads.submit(model.load_adapter, "dora")
        try:
            assert reading.wait(10)
            engine.submit(PROMPT, "lora", max_new_tokens=2).result(10)
            assert not loading.done()
        finally:
            gate.set()
        loading.result(60)
        assert bank["dora"].blake3 in model.pool.keys
        at_rest(engine)


@pytest.mark.parametrize("change", ["replaced", "removed", "unloaded"])
def test_an_adapter_that_changes_while_it_is_loaded_ahead(bank, folders, monkeypatch, change):
    model, read = MultiLoraModel(double(), bank), bank.read_into
    old = bank["dora"].blake3

    def changed(entry, buffer):
        monkeypatch.setattr(bank, "read_into", read)
        extent = read(entry, buffer)
        if change == "replaced":
            replace(bank, "dora", folders["rslora"])
        elif change == "removed":
            bank.remove("dora")
        else:
            model.unload_adapter("dora")
        return extent

    monkeypatch.setattr(bank, "read_into", changed)
    if change == "replaced":
        model.load_adapter("dora")
        assert model.pool.keys == [bank["dora"].blake3] != [old]
    else:
        with pytest.raises(AdapterNotFoundError, match="dora"):
            model.load_adapter("dora")
        assert model.pool.keys == []


def test_what_was_found_in_the_bank_is_read_wherever_it_is_by_then(bank, folders):
    model = MultiLoraModel(double(), bank)
    content = bank.read("dora").weights.clone()
    found = model.adapter("dora")
    bank.remove("lora")
    bank.compact()  # the shard where it was is gone
    host = model.pool.host.read(found.source)
    assert Extent.of_bytes(host.layout, host.dtype, host.buffer).weights.equal(content)
    # A larger one under the name is not read into its buffer, whatever became of its own.
    replace(bank, "dora", folders["embeddings"])
    bank.compact()
    with pytest.raises(AdapterNotFoundError, match="'dora' was replaced in the bank while it was read"):
        model.pool.host.read(found.source)


# Under load


def test_nothing_is_lost_while_the_bank_changes(bank, folders):
    """Adapters come, go, are replaced and moved, as requests for them and for others run all the time."""
    model = MultiLoraModel(double(), bank)
    kinds = requests(12, [None, "lora", "rslora"], seed=3, longest=12)
    turns = [asked._replace(adapter="turn") for asked in requests(4, ["turn"], seed=4, longest=12)]
    expected = {asked: {alone(model, asked)} for asked in kinds}
    contents = {
        content: {asked: alone(model, asked._replace(adapter=content)) for asked in turns}
        for content in ("dora", "embeddings", "alora")
    }
    allowed = expected | {asked: {answers[asked] for answers in contents.values()} for asked in turns}
    assert all(len(answers) > 1 for asked, answers in allowed.items() if asked.adapter == "turn")
    stop, lost = threading.Event(), []

    def ask(seed):
        rng, count = random.Random(seed), 0
        while not stop.is_set():
            asked = rng.choice([*kinds, *turns])
            try:
                found = engine.submit(asked.prompt, asked.adapter, max_new_tokens=asked.tokens).result(60).token_ids
            except AdapterNotFoundError as error:
                found = None
                if asked.adapter != "turn":
                    lost.append(error)
            if found is not None and found not in allowed[asked]:
                lost.append((asked, found))
            count += 1
        return count

    with Engine(model, SMALL) as engine, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, seed) for seed in range(4)]
        rng, end, changes = random.Random(0), time.monotonic() + 6, 0
        try:
            while time.monotonic() < end:
                content = rng.choice(list(contents))
                if "turn" in bank and rng.random() < 0.5:
                    bank.remove("turn")
                    with pytest.raises(AdapterNotFoundError):
                        engine.submit(PROMPT, "turn")
                replace(bank, "turn", folders[content])
                if rng.random() < 0.7:
                    bank.compact()
                # From here on it is this content, and no other.
                for asked in turns:
                    found = engine.submit(asked.prompt, "turn", max_new_tokens=asked.tokens).result(60).token_ids
                    assert found == contents[content][asked]
                changes += 1
        finally:
            stop.set()
        counts = [future.result(60) for future in asking]
        assert changes > 3 and min(counts) > 3 and not lost
        at_rest(engine)
        bank.remove("turn")
        engine.submit(PROMPT, max_new_tokens=1).result(60)
        assert set(model.pool.keys) <= {bank[name].blake3 for name in bank.names}
    bank.verify()
