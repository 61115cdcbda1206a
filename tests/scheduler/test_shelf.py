"""Adapters' bytes by their contents, from banks that come and go."""

import shutil

import pytest
import torch
from served import family

import lorakit
from lorakit.errors import AdapterNotFoundError, BankCorruptedError, BankError
from lorakit.scheduler.shelf import Shelf


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    base, tenants = family()
    return lorakit.export({"lora": tenants["lora"]}, tmp_path_factory.mktemp("shelf") / "bank", base_model=base)


def as_stored(bank):
    buffer = torch.empty(bank["lora"].nbytes, dtype=torch.uint8)
    bank.read_into("lora", buffer)
    return buffer.numpy().tobytes()


def test_banks_may_come_and_go(bank, tmp_path):
    shelf, key = Shelf([tmp_path / "one", tmp_path / "many"]), bank["lora"].blake3
    with pytest.raises(AdapterNotFoundError, match=key):
        shelf.read(key)
    for place in ("many/0", "many/1", "one"):
        shutil.copytree(bank.path, tmp_path / place)
        assert shelf.read(key).tobytes() == as_stored(bank)
    for place in ("many/0", "one"):
        shutil.rmtree(tmp_path / place)
        assert shelf.read(key).tobytes() == as_stored(bank)
    shutil.rmtree(tmp_path / "many")
    with pytest.raises(AdapterNotFoundError, match=key):
        shelf.read(key)


def test_a_damaged_bank_is_told(bank, tmp_path):
    shelf, key = Shelf([tmp_path / "one"]), bank["lora"].blake3
    shutil.copytree(bank.path, tmp_path / "one")
    (shard,) = (tmp_path / "one").glob("*.safetensors")
    shard.write_bytes(b"")
    with pytest.raises(BankCorruptedError):
        shelf.read(key)
    (tmp_path / "one" / "bank.json").write_text("{")
    with pytest.raises(BankError):
        shelf.read(key)
