from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forms import lora_form, odd_form, same_bits
from safetensors import safe_open
from safetensors.torch import load_file

from lorakit.adapters import shard
from lorakit.adapters.entry import AdapterEntry, place_extras
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.layout import Layout, weight_dtype
from lorakit.adapters.packing import blocks
from lorakit.adapters.shard import ShardFacts, ShardSeries, read_header, read_range
from lorakit.errors import BankCorruptedError, BankError


def entry_of(name: str, form: AdapterForm) -> AdapterEntry:
    layout = Layout.of(form)
    dtype = weight_dtype(form)
    extras = place_extras(form.extras, layout.nbytes(dtype))
    return AdapterEntry(name, form.method, layout, form.config, dtype, extras)


def write(
    folder: Path, forms: dict[str, AdapterForm], more: int | None = None, **options: int
) -> tuple[list[AdapterEntry], dict[str, ShardFacts]]:
    with ShardSeries(folder, 1, **options) as series:
        for count, (name, form) in enumerate(forms.items(), start=1):
            entry = entry_of(name, form)
            series.add(entry, blocks(entry, form), len(forms) - count if more is None else more, len(name))
        return series.finish()


def test_safetensors_reads_it(tmp_path: Path) -> None:
    forms = {f"odd-{seed}": odd_form(seed) for seed in range(3)} | {"plain": lora_form(dtype=torch.float16)}
    entries, facts = write(tmp_path, forms, more=20)
    assert [entry.name for entry in entries] == list(forms)
    assert list(facts) == ["bank-0001.safetensors"]
    tensors = load_file(tmp_path / "bank-0001.safetensors")
    with safe_open(tmp_path / "bank-0001.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, form in forms.items():
        for path, module in form.modules.items():
            for item, tensor in module.tensors():
                lies = tensor.mT if item == "b" else tensor
                assert same_bits(tensors.pop(f"{name}/{path}/{item}"), lies)
        for key, tensor in form.extras.items():
            assert same_bits(tensors.pop(f"{name}/extras/{key}"), tensor)
    # What is left are the gaps: zeros.
    assert all("/~pad" in name and not tensor.any() for name, tensor in tensors.items())


def test_an_adapter_is_one_range(tmp_path: Path) -> None:
    # The same modules, so that the header's area fits all.
    forms = {f"odd-{index}": odd_form(1) for index in range(3)}
    entries, facts = write(tmp_path, forms)
    path = tmp_path / entries[0].shard
    header = read_header(path, facts[entries[0].shard].nbytes)
    for entry in entries:
        assert entry.offset % 64 == 0
        inside = [
            (begin, end)
            for name, (_, _, begin, end) in header.items()
            if name.startswith(f"{entry.name}/") and name != f"{entry.name}/~pad"
        ]
        assert min(inside)[0] == entry.offset
        assert max(end for _, end in inside) == entry.offset + entry.stored_nbytes
        assert sum(end - begin for begin, end in inside) == entry.stored_nbytes


def test_weights_of_several_dtypes_are_promoted(tmp_path: Path) -> None:
    half, brain = lora_form(0, dtype=torch.float16), lora_form(1, dtype=torch.bfloat16, targets=("k_proj",))
    entries, _ = write(tmp_path, {"mixed": AdapterForm("lora", {**half.modules, **brain.modules}, {})})
    assert entries[0].dtype == torch.float32
    tensors = load_file(tmp_path / entries[0].shard)
    for path, module in {**half.modules, **brain.modules}.items():
        assert same_bits(tensors[f"mixed/{path}/a"], module.a.float())


def test_tensors_in_other_orders_of_memory(tmp_path: Path) -> None:
    form = lora_form()
    turned = {path: replace(module, a=module.a.T.contiguous().T) for path, module in form.modules.items()}
    entries, _ = write(tmp_path, {"x": AdapterForm("lora", turned, {})})
    same, _ = write(tmp_path, {"x": AdapterForm("lora", form.modules, {})})
    assert entries[0].blake3 == same[0].blake3


def test_the_header_wastes_nothing_for_one_recipe(tmp_path: Path) -> None:
    write(tmp_path, {"a": lora_form()})
    data = (tmp_path / "bank-0001.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    assert (8 + length) % 64 == 0
    # Room is left for one gap before the adapter and for the alignment of the data.
    assert length - len(header.rstrip()) < 200
    assert json.loads(header)["a/model.layers.0.self_attn.q_proj/a"]["shape"] == [4, 24]


def test_full_shards_roll_over(tmp_path: Path) -> None:
    forms = {f"t-{index}": lora_form(index) for index in range(10)}
    each = entry_of("t", lora_form()).stored_nbytes
    entries, facts = write(tmp_path, forms, shard_bytes=3 * each)
    assert list(facts) == [f"bank-000{number}.safetensors" for number in (1, 2, 3, 4)]
    assert [entry.shard for entry in entries] == [f"bank-000{1 + index // 3}.safetensors" for index in range(10)]
    assert all(facts[name].nbytes == (tmp_path / name).stat().st_size for name in facts)
    assert sum(fact.payload_nbytes for fact in facts.values()) == 10 * each


def test_full_headers_roll_over(tmp_path: Path) -> None:
    # The first adapter is small and nothing is expected behind it, so the area is too small for the second.
    forms = {"small": lora_form(layers=1, targets=("q",)), "large": lora_form(layers=20)}
    entries, facts = write(tmp_path, forms, more=0)
    assert [entry.shard for entry in entries] == ["bank-0001.safetensors", "bank-0002.safetensors"]
    for name, fact in facts.items():
        assert read_header(tmp_path / name, fact.nbytes)
        assert load_file(tmp_path / name)


def test_an_adapter_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    entries, _ = write(tmp_path, {"a": lora_form(), "b": lora_form(hidden=8), "c": lora_form()}, shard_bytes=100)
    assert len({entry.shard for entry in entries}) == 3


def test_an_adapter_without_tensors(tmp_path: Path) -> None:
    entries, facts = write(tmp_path, {"none": AdapterForm("lora", {}, {})})
    assert entries[0].stored_nbytes == 0
    assert load_file(tmp_path / entries[0].shard) == {}
    assert read_header(tmp_path / entries[0].shard, facts[entries[0].shard].nbytes) == {}


def test_broken_headers_are_refused(tmp_path: Path) -> None:
    entries, facts = write(tmp_path, {"a": lora_form()})
    path = tmp_path / entries[0].shard
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")

    def with_header(text: str) -> bytes:
        return good[:8] + text.encode().ljust(end - 8) + good[end:]

    for bad in (
        b"\xff" * 8 + good[8:],
        bytes(8) + good[8:],
        with_header("[]"),
        with_header("{}"),
        with_header('{"x": 3}'),
        with_header('{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}'),
        with_header('{"x": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}'),
        with_header('{"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}'),
        with_header('{"x": {"dtype": "U8", "shape": [1], "data_offsets": [0.5, "y"]}}'),
        with_header("[" * (end - 8)),
    ):
        path.write_bytes(bad)
        with pytest.raises(BankCorruptedError):
            read_header(path, facts[path.name].nbytes)
    path.write_bytes(good[:-1])
    with pytest.raises(BankCorruptedError, match="bytes instead of"):
        read_header(path, facts[path.name].nbytes)
    with pytest.raises(BankCorruptedError, match="cut off"):
        read_range(path, end, torch.empty(len(good) - end, dtype=torch.uint8))
    path.unlink()
    with pytest.raises(BankCorruptedError, match="cannot be read"):
        read_header(path, 1)


def test_a_sync_that_failed_meanwhile_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The system tells of lost bytes once: the sync at the end succeeds again.
    calls: list[int] = []
    real = os.fsync

    def fail_once(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(shard, "_SYNC_BYTES", 0)
    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(BankError, match="Input/output error"):
        write(tmp_path, {f"t-{index}": lora_form(index) for index in range(5)})
    assert calls and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_only_the_end_stays_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, dropped = 1000, {}
    real = os.posix_fadvise

    def note(handle: int, offset: int, length: int, advice: int) -> None:
        assert (offset, advice) == (0, os.POSIX_FADV_DONTNEED)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).removesuffix(".tmp")
        dropped[name] = max(length, dropped.get(name, 0))
        real(handle, offset, length, advice)

    monkeypatch.setattr(shard, "_KEPT_BYTES", kept)
    monkeypatch.setattr(os, "posix_fadvise", note)
    form = lora_form()
    forms = {f"t-{index}": lora_form(index) for index in range(6)}
    _, facts = write(tmp_path, forms, shard_bytes=3 * entry_of("t", form).stored_nbytes)
    first, second = (tmp_path / name for name in facts)
    assert dropped == {first.name: first.stat().st_size, second.name: second.stat().st_size - kept}
