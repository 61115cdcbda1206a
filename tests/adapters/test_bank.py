from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from forms import BASE, assert_same_form, lora_form, make_bank, odd_form, same_bits
from safetensors.torch import load_file

from lorakit.adapters import peft_writer
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.layout import Layout
from lorakit.errors import (
    AdapterExistsError,
    AdapterNameError,
    AdapterNotFoundError,
    BankCorruptedError,
    BankError,
    NonFiniteWeightsError,
)


def shards_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    forms = {f"odd-{seed}": odd_form(seed, dtype) for seed in range(6)}
    forms["plain"] = lora_form(dtype=dtype)
    bank = make_bank(tmp_path / "bank", **forms)
    for opened in (bank, AdapterBank.open(tmp_path / "bank")):
        assert opened.names == list(forms)
        for name, form in forms.items():
            assert opened[name].dtype == dtype
            assert_same_form(opened.form(name), form)
        opened.verify()


def test_it_is_a_mapping(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", sql=lora_form(0, dtype=torch.bfloat16), legal=odd_form())
    assert (bank.base_id, bank.fingerprint) == (BASE["base_id"], BASE["fingerprint"])
    assert list(bank) == bank.names == ["sql", "legal"]
    assert len(bank) == 2 and "sql" in bank and "other" not in bank and bank.get("other") is None
    entry = bank["sql"]
    assert (entry.name, entry.method, entry.rank, entry.ranks) == ("sql", "lora", 4, (4,))
    assert (entry.dtype, entry.source, entry.uses_base_weights) == (torch.bfloat16, "runs/sql", False)
    assert entry.parameters == 4 * 2 * 4 * 24 and entry.nbytes == entry.stored_nbytes == 2 * entry.parameters
    assert entry.modules[0] == "model.layers.0.self_attn.q_proj" and len(entry.modules) == 4
    assert entry.config["lora_alpha"] == 8
    assert bank["legal"].uses_base_weights and bank["legal"].stored_nbytes > bank["legal"].nbytes
    data = (tmp_path / "bank" / entry.shard).read_bytes()[entry.offset : entry.offset + entry.stored_nbytes]
    assert blake3(data).hexdigest() == entry.blake3
    assert "org/base" in repr(bank)
    assert pickle.loads(pickle.dumps(bank)).names == bank.names


def test_unknown_names_get_a_hint(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", sql=lora_form())
    with pytest.raises(AdapterNotFoundError, match="Did you mean 'sql'"):
        bank["sqll"]
    with pytest.raises(KeyError, match="It holds sql"):
        bank.read("zebra")
    with pytest.raises(AdapterNotFoundError):
        bank.remove("sql", "zebra")
    assert bank.names == ["sql"]
    with pytest.raises(AdapterNotFoundError, match="no adapters yet"):
        AdapterBank.create(tmp_path / "empty", **BASE)["x"]


def test_read_is_one_extent(tmp_path: Path) -> None:
    form = odd_form(2)
    bank = make_bank(tmp_path / "bank", x=form)
    layout = Layout.of(form)
    weights, vectors = layout.pack(form, torch.bfloat16)
    extent = bank.read("x")
    assert extent.layout == layout and extent.nbytes == bank["x"].nbytes
    assert same_bits(extent.weights, weights) and same_bits(extent.vectors, vectors)
    buffer = torch.full((bank["x"].nbytes + 100,), 7, dtype=torch.uint8)
    into = bank.read_into("x", buffer)
    assert same_bits(into.weights, weights) and same_bits(into.vectors, vectors)
    assert into.weights.data_ptr() == buffer.data_ptr()
    assert (buffer[bank["x"].nbytes :] == 7).all()


def test_opening_reads_the_index_only(tmp_path: Path) -> None:
    make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    for name in shards_of(tmp_path / "bank"):
        (tmp_path / "bank" / name).unlink()
    bank = AdapterBank.from_pretrained(tmp_path / "bank")
    assert bank.names == ["a", "b"] and bank["a"].rank == 4 and bank.info().live_nbytes > 0
    with pytest.raises(BankCorruptedError, match=r"'a' in bank-0001.safetensors.*Restore"):
        bank.read("a")
    with pytest.raises(BankCorruptedError, match="cannot be read"):
        bank.read_into("a", torch.empty(bank["a"].nbytes, dtype=torch.uint8))


def test_index_shares_what_one_recipe_shares(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", **{f"t-{seed}": lora_form(seed) for seed in range(20)}, odd=odd_form())
    bank.add_forms([("later", lora_form(50), "")])
    index = json.loads((tmp_path / "bank" / "bank.json").read_bytes())
    assert len(index["layouts"]) == len(index["configs"]) == 2 and len(index["extras"]) == 1
    assert list(index["adapters"]) == [*(f"t-{seed}" for seed in range(20)), "odd", "later"]
    opened = AdapterBank.open(tmp_path / "bank")
    assert opened["t-1"].layout is opened["later"].layout
    assert opened["t-1"] == bank["t-1"]


def test_the_index_is_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        make_bank(tmp_path / name, x=lora_form(0), y=odd_form(), z=lora_form(rank=2))
    for file in ["bank.json", *shards_of(tmp_path / "a")]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_lazy_forms_and_generators(tmp_path: Path) -> None:
    bank = AdapterBank.create(tmp_path / "bank", **BASE)
    seen = []
    bank.add_forms(
        [(f"t-{seed}", lambda seed=seed: lora_form(seed), "") for seed in range(3)],
        progress=lambda name, nbytes: seen.append((name, nbytes)),
    )
    bank.add_forms((f"g-{seed}", lora_form(seed), "") for seed in range(3))
    bank.add_forms([])
    assert seen == [(f"t-{seed}", bank["t-0"].nbytes) for seed in range(3)]
    assert bank["t-2"].blake3 == bank["g-2"].blake3
    bank.verify()
    assert shards_of(tmp_path / "bank") == ["bank-0001.safetensors", "bank-0002.safetensors"]


def test_many_small_shards(tmp_path: Path) -> None:
    bank = AdapterBank.create(tmp_path / "bank", **BASE)
    bank.add_forms([(f"t-{seed}", lora_form(seed), "") for seed in range(7)], shard_bytes=7000)
    assert len(shards_of(tmp_path / "bank")) == 4
    bank.verify()
    assert_same_form(bank.form("t-6"), lora_form(6))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        ".hidden",
        "-x",
        "x" * 129,
        "é",
        "a b",
        "a\n",
        "a\0",
        "con",
        "NUL.txt",
        None,
        3,
    ],
)
def test_bad_names_are_refused(tmp_path: Path, name: object) -> None:
    bank = AdapterBank.create(tmp_path / "bank", **BASE)
    for items in ([("ok", lora_form(), ""), (name, lora_form(), "")], iter([(name, lora_form(), "")])):
        with pytest.raises(AdapterNameError, match="Choose 1 to 128 letters"):
            bank.add_forms(items)
    assert bank.names == [] and shards_of(tmp_path / "bank") == []


@pytest.mark.parametrize("name", ["a", "0", "x" * 128, "org.model_v1-2", "connect", "A..b"])
def test_good_names(tmp_path: Path, name: str) -> None:
    make_bank(tmp_path / "bank", **{name: lora_form(layers=1)}).verify()


def test_a_batch_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form())

    def never() -> AdapterForm:
        raise AssertionError("converted too early")

    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        bank.add_forms([("b", never, ""), ("a", never, "")])
    with pytest.raises(AdapterNameError, match="twice"):
        bank.add_forms([("b", never, ""), ("b", never, "")])
    with pytest.raises(AdapterNameError, match="twice"):
        bank.add_forms(iter([("b", lora_form(), ""), ("b", lora_form(), "")]))
    assert bank.names == ["a"] and shards_of(tmp_path / "bank") == ["bank-0001.safetensors"]


def test_all_or_nothing(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form())
    before = (tmp_path / "bank" / "bank.json").read_bytes()
    broken = lora_form()
    broken.modules["model.layers.1.self_attn.v_proj"].b[3, 2] = float("nan")

    def fail() -> AdapterForm:
        raise RuntimeError("no such checkpoint")

    for last, error in ((broken, NonFiniteWeightsError), (fail, RuntimeError)):
        items = [(f"t-{seed}", lora_form(seed), "") for seed in range(5)]
        with pytest.raises(error):
            bank.add_forms([*items, ("bad", last, "")], shard_bytes=4000)
        assert (tmp_path / "bank" / "bank.json").read_bytes() == before
        assert bank.names == ["a"]
        assert shards_of(tmp_path / "bank") == ["bank-0001.safetensors"]
        assert not list((tmp_path / "bank").glob("*.tmp"))
    bank.verify()


def test_overwrite(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    bank.add_forms([("a", odd_form(), "new"), ("c", lora_form(2), "")], overwrite=True)
    assert bank.names == ["a", "b", "c"] and bank["a"].source == "new"
    assert_same_form(bank.form("a"), odd_form())
    assert bank.info().dead_nbytes == bank["b"].stored_nbytes
    # The last one of the first shard goes, and the shard with it; its number is not used again.
    bank.add_forms([("b", lora_form(3), "")], overwrite=True)
    assert shards_of(tmp_path / "bank") == ["bank-0002.safetensors", "bank-0003.safetensors"]
    assert bank.info().dead_nbytes == 0
    AdapterBank.open(tmp_path / "bank").verify()


def test_remove_and_compact(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    bank = make_bank(path, **{f"t-{seed}": odd_form(seed) for seed in range(5)})
    bank.add_forms([("whole", lora_form(), "")])
    stale = AdapterBank.open(path)
    bank.remove("t-1", "t-3")
    assert bank.names == ["t-0", "t-2", "t-4", "whole"]
    info = bank.info()
    assert info.dead_nbytes == sum(stale[name].stored_nbytes for name in ("t-1", "t-3"))
    assert info.live_nbytes == sum(entry.stored_nbytes for entry in bank.values())
    assert info.nbytes == sum((path / name).stat().st_size for name in shards_of(path))
    # A reader with the old index still reads what is on the disk.
    assert_same_form(stale.form("t-1"), odd_form(1))
    moved: list[str] = []
    before = sum((path / name).stat().st_size for name in shards_of(path))
    freed = bank.compact(progress=lambda name, nbytes: moved.append(name))
    assert freed == before - sum((path / name).stat().st_size for name in shards_of(path)) > 0
    assert moved == ["t-0", "t-2", "t-4"]
    assert bank.info().dead_nbytes == 0 and bank.names == ["t-0", "t-2", "t-4", "whole"]
    assert bank.compact() == 0
    opened = AdapterBank.open(path)
    opened.verify()
    for seed in (0, 2, 4):
        assert_same_form(opened.form(f"t-{seed}"), odd_form(seed))
        assert opened[f"t-{seed}"].source == f"runs/t-{seed}"
    with pytest.raises(BankCorruptedError, match="open it again"):
        stale.read("t-0")
    bank.remove(*bank.names)
    assert len(bank) == 0 and shards_of(path) == []


@pytest.mark.parametrize("read", ["read", "form", "read_into"])
def test_what_is_moved_while_it_is_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    """By another thread, after the index was asked where it lies."""
    bank = make_bank(tmp_path / "bank", gone=lora_form(0), x=lora_form(1))
    expected, entry = bank.read("x").weights.clone(), bank["x"]
    folder = bank._folder

    def moved(name: str) -> Callable[..., Any]:
        method = getattr(folder, name)

        def first(*args: Any) -> Any:
            monkeypatch.undo()
            bank.remove("gone")
            bank.compact()
            assert not (bank.path / entry.shard).exists()
            return method(*args)

        return first

    for name in ("read", "read_into"):
        monkeypatch.setattr(folder, name, moved(name))
    if read == "form":
        assert_same_form(bank.form("x"), lora_form(1))
    else:
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        extent = bank.read("x") if read == "read" else bank.read_into("x", buffer)
        assert same_bits(extent.weights, expected)


def test_what_the_index_said_of_an_adapter_reads_no_other(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", x=lora_form(0))
    expected, entry = bank.read("x").weights.clone(), bank["x"]
    bank.add_forms([("x", lora_form(1), "")], overwrite=True)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    with pytest.raises(BankCorruptedError, match="'x'"):
        bank.read_into(entry, buffer)
    assert not same_bits(bank.read_into("x", buffer).weights, expected)


def test_compact_refuses_damaged_adapters(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    bank.remove("a")
    shard = tmp_path / "bank" / bank["b"].shard
    data = bytearray(shard.read_bytes())
    data[bank["b"].offset + 5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BankCorruptedError, match="BLAKE3"):
        bank.compact()
    assert shard.read_bytes() == data and shards_of(tmp_path / "bank") == [shard.name]


def test_other_writers_are_seen(tmp_path: Path) -> None:
    one = make_bank(tmp_path / "bank", a=lora_form(0))
    two = AdapterBank.open(tmp_path / "bank")
    two.add_forms([("b", lora_form(1), "")])
    assert one.names == ["a"]
    with pytest.raises(AdapterExistsError):
        one.add_forms([("b", lora_form(2), "")])
    assert one.names == ["a", "b"]
    two.remove("a")
    one.add_forms([("c", lora_form(3), "")])
    assert one.names == ["b", "c"]
    two.reload()
    assert two.names == ["b", "c"]


def test_only_what_is_ours_is_swept(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0))
    keep = {"README.md", "bank-notes.safetensors", "bank.json.bak", "x.tmp"}
    sweep = {"bank-0007.safetensors", "bank-0009.safetensors.tmp", "bank.json.tmp"}
    for name in keep | sweep:
        (tmp_path / "bank" / name).write_text("x")
    bank.add_forms([("b", lora_form(1), "")])
    found = {path.name for path in (tmp_path / "bank").iterdir()} - {".lock"}
    assert found == keep | {"bank.json", "bank-0001.safetensors", "bank-0002.safetensors"}


def test_create_refuses_what_is_there(tmp_path: Path) -> None:
    make_bank(tmp_path / "bank", a=lora_form())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for name, message in (("bank", "holds a bank already"), ("other", "not empty"), ("other/notes.txt", "is a file")):
        with pytest.raises(BankError, match=message):
            AdapterBank.create(tmp_path / name, **BASE)
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["notes.txt"]
    assert AdapterBank.open(tmp_path / "bank").names == ["a"]
    (tmp_path / "empty").mkdir()
    assert AdapterBank.create(tmp_path / "empty", **BASE).names == []
    assert AdapterBank.create(tmp_path / "deep" / "er", **BASE).names == []


def test_open_refuses_what_is_no_bank(tmp_path: Path) -> None:
    with pytest.raises(BankError, match="is no folder"):
        AdapterBank.from_pretrained(tmp_path / "nothing")
    with pytest.raises(BankError, match="has no bank.json"):
        AdapterBank.open(tmp_path)
    bank = make_bank(tmp_path / "bank", a=lora_form())
    (tmp_path / "bank" / "bank.json").unlink()
    with pytest.raises(BankError, match="has no bank.json"):
        bank.remove("a")


def test_refusals_of_the_system_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form())

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(BankError, match="No space left.*Free space"):
        patch.setattr(os, "pwrite", full)
        bank.add_forms([("b", lora_form(), "")])
    assert bank.names == ["a"] and shards_of(tmp_path / "bank") == ["bank-0001.safetensors"]
    bank.verify()


def test_damage_is_listed(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1), c=lora_form(2))
    bank.add_forms([("d", lora_form(3), "")])
    shard = tmp_path / "bank" / bank["b"].shard
    data = bytearray(shard.read_bytes())
    data[bank["b"].offset] ^= 64
    shard.write_bytes(data)
    (tmp_path / "bank" / bank["d"].shard).unlink()
    with pytest.raises(BankCorruptedError, match=r"'b' in bank-0001.*'d' in bank-0002.*Restore") as error:
        bank.verify()
    assert "'a'" not in str(error.value)
    seen: list[str] = []
    bank.verify(["a", "c"], progress=lambda name, nbytes: seen.append(name))
    assert seen == ["a", "c"]
    assert {damage.adapter for damage in bank.damages()} == {None, "b", "d"}


def test_verify_finds_weights_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only another writer than this one can make such a bank.
    monkeypatch.setattr(AdapterForm, "check_finite", lambda form, name: None)
    broken = lora_form()
    broken.modules["model.layers.1.self_attn.v_proj"].b[3, 2] = float("inf")
    bank = make_bank(tmp_path / "bank", x=broken)
    with pytest.raises(BankCorruptedError, match="NaN or Inf"):
        bank.verify()


def test_export_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = odd_form()
    bank = make_bank(tmp_path / "bank", x=form)

    def restore(form: AdapterForm, base: object = None) -> dict[str, torch.Tensor]:
        tensors = {f"base_model.model.{path}.b": m.b for path, m in form.modules.items() if m.b is not None}
        turned = {f"base_model.model.{path}.a": m.a.T for path, m in form.modules.items() if m.a is not None}
        return {**tensors, **turned, **form.extras}

    monkeypatch.setattr(peft_writer, "restore", restore)
    out = tmp_path / "deep" / "out"
    assert bank.export_peft("x", out) == out
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (out / "adapter_config.json").read_text() == json.dumps(form.config, indent=2, sort_keys=True)
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors.keys() == restore(form).keys()
    assert all(same_bits(tensor, restore(form)[key]) for key, tensor in tensors.items())
    with pytest.raises(BankError, match="not empty"):
        bank.export_peft("x", out)
    (tmp_path / "ready").mkdir()
    bank.export_peft("x", tmp_path / "ready")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(AdapterNotFoundError):
        bank.export_peft("y", tmp_path / "never")
    assert not (tmp_path / "never").exists()

    def fail(form: AdapterForm, base: object) -> dict[str, torch.Tensor]:
        raise RuntimeError

    monkeypatch.setattr(peft_writer, "restore", fail)
    with pytest.raises(RuntimeError):
        bank.export_peft("x", tmp_path / "never")
    assert not (tmp_path / "never").exists()
