"""Whatever is in bank.json or in the shards: typed errors only, and no wrong byte is taken for a right one."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import lora_form, make_bank, odd_form
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorakit.adapters.folder as folder_module
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.fields import content_key
from lorakit.adapters.index import Index
from lorakit.errors import BankCorruptedError, BankError, LorakitError

JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 8, 64, 1 << 31, 1 << 49, 1 << 64, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["../x.safetensors", "/etc/passwd", "bank-0001.safetensors", "float64", "\ud800", "x" * 500]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "bank"
    bank = make_bank(path, a=lora_form(0, dtype=torch.bfloat16), odd=odd_form(), b=lora_form(1, dtype=torch.bfloat16))
    bank.add_forms([("c", lora_form(2, rank=3), "")])
    return path


@pytest.fixture(scope="module")
def scratch(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(pristine, tmp_path_factory.mktemp("scratch") / "bank")


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def rekeyed(index: Any) -> Any:
    """The index with the keys that a forger would give to what was changed."""
    renamed = {}
    for table in ("layouts", "configs", "extras"):
        if isinstance(index.get(table), dict):
            renamed |= {key: content_key(value) for key, value in index[table].items()}
            index[table] = {content_key(value): value for value in index[table].values()}
    for entry in index["adapters"].values() if isinstance(index.get("adapters"), dict) else []:
        for table in ("layout", "config", "extras"):
            if isinstance(entry, dict) and isinstance(entry.get(table), str):
                entry[table] = renamed.get(entry[table], entry[table])
    return index


def use(path: Path) -> None:
    """Does everything that reads; every error must be ours."""
    try:
        bank = AdapterBank.open(path)
    except BankError:
        return
    bank.info()
    for name in bank.names:
        try:
            bank.read(name)
            bank.form(name)
        except LorakitError:
            pass
    bank.damages()


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_indexes(pristine: Path, scratch: Path, data: st.DataObject) -> None:
    index = json.loads((pristine / "bank.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(places(index)))
        change = data.draw(st.sampled_from(["set", "delete", "rename", "swap"]))
        if change == "set" or isinstance(container, list):
            container[key] = data.draw(JSON_VALUES)
        elif change == "delete":
            del container[key]
        elif change == "rename":
            container[data.draw(st.sampled_from(["../x", "x", "", "bank-0009.safetensors", "\ud800"]))] = container.pop(
                key
            )
        else:
            container[key] = container[data.draw(st.sampled_from(sorted(container)))]
    (scratch / "bank.json").write_text(json.dumps(rekeyed(copy.deepcopy(index))))
    use(scratch)


@given(data=st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_bytes_of_the_index(pristine: Path, scratch: Path, data: st.DataObject) -> None:
    content = bytearray((pristine / "bank.json").read_bytes())
    change = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if change == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del content[place:]
    else:
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    (scratch / "bank.json").write_bytes(content)
    use(scratch)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 4, "newer lorakit"),
        (["format_version"], 2, "Export its adapters again"),
        (["format_version"], "1", "format_version"),
        (["base"], [], "base should be an object"),
        (["base", "id"], None, "id"),
        (["shards", "../bank-0001.safetensors"], {"nbytes": 1, "payload_nbytes": 1}, "no name of a shard"),
        (["shards", "bank-0001.safetensors\n"], {"nbytes": 1, "payload_nbytes": 1}, "no name of a shard"),
        (["next_shard"], 1, "no name of a shard"),
        (["adapters", "a", "shard"], "../secret", "shard"),
        (["adapters", "a", "offset"], 1 << 40, "outside"),
        (["adapters", "a", "offset"], 0, "offset"),
        (["adapters", "a", "nbytes"], 1 << 40, "nbytes"),
        (["adapters", "a", "dtype"], "float64", "dtype"),
        (["adapters", "a", "base_quantisation"], 4, "base_quantisation"),
        (["adapters", "a", "layout"], "0" * 16, "layout"),
        (["adapters", "a", "layout"], ["x"], "layout"),
        (["adapters", "a", "blake3"], "F" * 64, "blake3"),
        (["adapters", "../a"], {}, "no adapter's name"),
        (["layouts"], {"0" * 16: {}}, "does not match its key"),
    ],
)
def test_wrong_fields_are_named(pristine: Path, path: list[str], value: object, message: str) -> None:
    index = json.loads((pristine / "bank.json").read_bytes())
    container = index
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value
    with pytest.raises(BankError, match=message):
        Index.parse(json.dumps(index).encode())


def test_overlapping_adapters_are_refused(pristine: Path) -> None:
    index = json.loads((pristine / "bank.json").read_bytes())
    index["adapters"]["b"]["offset"] = index["adapters"]["a"]["offset"] + 64
    with pytest.raises(BankError, match="overlaps"):
        Index.parse(json.dumps(index).encode())


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000, b"9" * 10_000]
)
def test_no_index_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bank.json").write_bytes(content)
    with pytest.raises(BankError, match="Restore it from a copy"):
        AdapterBank.open(tmp_path)


def test_huge_indexes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "INDEX_LIMIT", 1000)
    (tmp_path / "bank.json").write_bytes(b" " * 1001)
    with pytest.raises(BankError, match="too large"):
        AdapterBank.open(tmp_path)


def test_absurd_sizes_take_no_memory(pristine: Path, scratch: Path) -> None:
    index = json.loads((pristine / "bank.json").read_bytes())
    layout = index["layouts"][index["adapters"]["c"]["layout"]]
    layout["weights"] = 1 << 46
    index["adapters"]["c"]["nbytes"] = 1 << 48
    index["shards"]["bank-0002.safetensors"]["nbytes"] = 1 << 49
    (scratch / "bank.json").write_text(json.dumps(rekeyed(index)))
    bank = AdapterBank.open(scratch)
    with pytest.raises(BankCorruptedError, match="cut off"):
        bank.read("c")
    with pytest.raises(BankCorruptedError):
        bank.verify()


def test_every_flipped_bit_is_found(pristine: Path, tmp_path: Path) -> None:
    path = shutil.copytree(pristine, tmp_path / "bank")
    bank = AdapterBank.open(path)
    pick = random.Random(0)
    for name, entry in bank.items():
        shard = path / entry.shard
        data = bytearray(shard.read_bytes())
        ends = [0, entry.nbytes - 1, entry.nbytes, entry.stored_nbytes - 1]
        some = {min(place, entry.stored_nbytes - 1) for place in ends} | {
            pick.randrange(entry.stored_nbytes) for _ in range(12)
        }
        for place in some:
            bit = 1 << pick.randrange(8)
            data[entry.offset + place] ^= bit
            shard.write_bytes(data)
            assert [damage.adapter for damage in bank.damages()] == [name]
            data[entry.offset + place] ^= bit
        shard.write_bytes(data)
    bank.verify()


def test_flipped_bits_of_headers(pristine: Path, tmp_path: Path) -> None:
    path = shutil.copytree(pristine, tmp_path / "bank")
    bank = AdapterBank.open(path)
    shard = path / "bank-0002.safetensors"
    data = bytearray(shard.read_bytes())
    pick = random.Random(0)
    for place in [*range(16), *(pick.randrange(bank["c"].offset) for _ in range(60))]:
        bit = 1 << pick.randrange(8)
        data[place] ^= bit
        shard.write_bytes(data)
        with pytest.raises(BankCorruptedError, match="header"):
            bank.verify(["c"])
        # Reading needs no header, so the adapter is still there.
        assert bank.form("c")
        data[place] ^= bit


def test_cut_and_extended_shards(pristine: Path, tmp_path: Path) -> None:
    path = shutil.copytree(pristine, tmp_path / "bank")
    bank = AdapterBank.open(path)
    shard = path / "bank-0001.safetensors"
    data = shard.read_bytes()
    pick = random.Random(0)
    for length in [0, 1, 7, 8, 9, len(data) - 1, *(pick.randrange(len(data)) for _ in range(20))]:
        shard.write_bytes(data[:length])
        with pytest.raises(BankCorruptedError, match=r"bank-0001\.safetensors"):
            bank.verify()
        for name, entry in bank.items():
            if entry.shard == shard.name and entry.offset + entry.stored_nbytes > length:
                with pytest.raises(BankCorruptedError, match=name):
                    bank.form(name)
            else:
                bank.form(name)
    shard.write_bytes(data + b"\0")
    with pytest.raises(BankCorruptedError, match="bytes instead of"):
        bank.verify()
    shard.unlink()
    shard.mkdir()
    with pytest.raises(BankCorruptedError):
        bank.verify()
    with pytest.raises(BankCorruptedError):
        bank.read("a")
