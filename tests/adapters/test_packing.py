"""An adapter's blocks: the same bytes whatever their size, and no NaN or Inf among them."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch
from forms import lora_form, odd_form

from lorakit.adapters import packing
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.index import Index
from lorakit.adapters.layout import Extent, Layout, stored
from lorakit.adapters.packing import blocks
from lorakit.adapters.sharing import Sharing
from lorakit.errors import NonFiniteWeightsError

FORMS = {
    "odd": odd_form(3),
    "float16": lora_form(dtype=torch.float16, rank=3, hidden=37),
    "wide": lora_form(rank=64, hidden=1500, dtype=torch.bfloat16),
    "extras": lora_form(
        extras={"a.b": torch.arange(7, dtype=torch.uint8), "x": torch.tensor(3.0, dtype=torch.float64)}
    ),
}


@pytest.mark.parametrize("size", [1, 100, 5000, packing.BLOCK_BYTES])
@pytest.mark.parametrize("name", FORMS)
def test_every_byte_is_in_its_place(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", size)
    form = FORMS[name]
    entry = Sharing(Index("base", {})).entry(name, form, "")
    data = torch.frombuffer(bytearray(b"".join(bytes(block) for block in blocks(entry, form))), dtype=torch.uint8)
    assert data.numel() == entry.stored_nbytes
    used = torch.zeros_like(data, dtype=torch.bool)
    for place in entry.tensors():
        path, item = place.name.removeprefix(f"{name}/").rsplit("/", 1) if "/~" not in place.name else ("", "")
        if not path:
            continue
        tensor = form.extras[item] if path == "extras" else stored(item, getattr(form.modules[path], item))
        here = data[place.begin : place.end]
        assert torch.equal(here, tensor.contiguous().view(-1).view(torch.uint8)), place.name
        used[place.begin : place.end] = True
    assert not data[~used].any()
    extent = Extent.of_form(form)
    assert torch.equal(
        data[: entry.nbytes], torch.cat([extent.weights.view(torch.uint8), extent.vectors.view(torch.uint8)])
    )


@pytest.mark.parametrize(("size", "run"), [(1, 1), (packing.BLOCK_BYTES, 1), (packing.BLOCK_BYTES, 1 << 30)])
@pytest.mark.parametrize("item", ["a", "b", "c", "d"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_found(
    monkeypatch: pytest.MonkeyPatch, item: str, size: int, run: int, value: float
) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", size)
    monkeypatch.setattr(packing, "_RUN_BYTES", run)
    form = odd_form(3)
    path, module = next((path, m) for path, m in form.modules.items() if getattr(m, item) is not None)
    entry = Sharing(Index("base", {})).entry("x", form, "")
    tensor = getattr(module, item)
    saved = tensor.view(-1)[-1].clone()
    tensor.view(-1)[-1] = value
    named = item.upper() if item in "ab" else item
    with pytest.raises(NonFiniteWeightsError, match=f"'x': {named} of {path}"):
        list(blocks(entry, form))
    tensor.view(-1)[-1] = saved
    assert len(b"".join(map(bytes, blocks(entry, form)))) == entry.stored_nbytes


@pytest.mark.parametrize("run", [1, 1 << 30])
def test_nothing_of_a_block_that_is_not_finite_is_given(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    monkeypatch.setattr(packing, "_RUN_BYTES", run)
    form = lora_form(dtype=torch.bfloat16)
    # Bits that are no number's, and are not looked at: extras go back to PEFT as they came.
    form = replace(form, extras={"x": torch.full((3,), torch.nan)})
    entry = Sharing(Index("base", {})).entry("x", form, "")
    assert sum(block.nbytes for block in blocks(entry, form)) == entry.stored_nbytes
    path = list(form.modules)[-1]
    form.modules[path].a[0, 0] = torch.inf
    given = blocks(entry, form)
    with pytest.raises(NonFiniteWeightsError, match=f"A of {path}"):
        next(given)


def test_tensors_that_share_a_storage_and_tensors_that_do_not() -> None:
    form, memory = lora_form(dtype=torch.bfloat16), torch.zeros(10_000, dtype=torch.bfloat16)
    place, modules = 3, {}
    for path, module in form.modules.items():
        views = {}
        for item, tensor in (("a", module.a), ("b", module.b)):
            views[item] = memory[place : place + tensor.numel()].view(tensor.shape)
            views[item].copy_(tensor)
            place += tensor.numel()
        # Of the last module's, one has a storage of its own, one does not lie in order, and one can be trained.
        modules[path] = replace(module, **views)
    path = list(modules)[-1]
    modules[path] = replace(modules[path], a=form.modules[path].a.T.contiguous().T)
    path = next(iter(modules))
    modules[path] = replace(modules[path], b=modules[path].b.clone().requires_grad_())
    same = AdapterForm(form.method, modules, form.config)
    entry = Sharing(Index("base", {})).entry("x", form, "")
    assert b"".join(map(bytes, blocks(entry, same))) == b"".join(map(bytes, blocks(entry, form)))


def test_a_layout_is_shared_by_equal_forms_and_by_no_others() -> None:
    sharing = Sharing(Index("base", {}))
    form = lora_form()
    first, second = list(form.modules)[:2]
    vector = torch.ones(form.modules[first].out_features)

    def with_bias(path: str) -> AdapterForm:
        return replace(form, modules={**form.modules, path: replace(form.modules[path], d=vector)})

    forms = {"plain": form, "same": lora_form(1), "half": lora_form(dtype=torch.float16)}
    forms |= {"first": with_bias(first), "second": with_bias(second), "other rank": lora_form(rank=8)}
    layouts = {name: sharing.entry(name, form, "").layout for name, form in forms.items()}
    assert all(layouts[name] == Layout.of(form) for name, form in forms.items())
    assert layouts["plain"] is layouts["same"] is layouts["half"]
    assert len({id(layout) for layout in layouts.values()}) == 4


@pytest.mark.parametrize("size", [1, 100, 1000])
@pytest.mark.parametrize("name", FORMS)
def test_a_buffer_is_left_alone_once_its_block_was_given(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", size)
    form = FORMS[name]
    entry = Sharing(Index("base", {})).entry(name, form, "")
    given, held = [], []

    def buffer(nbytes: int) -> torch.Tensor:
        held[:] = [torch.empty(nbytes, dtype=torch.uint8)]
        given.append(held[0])
        return held[0]

    for block in blocks(entry, form, buffer):
        here = numpy.frombuffer(block, numpy.uint8)
        assert not any(numpy.shares_memory(here, old.numpy()) for old in given if not held or old is not held[0])
        held.clear()


def test_bytes_that_are_packed_already_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", 7)
    data = torch.arange(23, dtype=torch.uint8)
    parts = [bytes(part) for part in packing.cut(data)]
    assert [len(part) for part in parts] == [7, 7, 7, 2]
    assert b"".join(parts) == bytes(data.tolist())


def test_an_adapter_without_tensors() -> None:
    form = AdapterForm("lora", {}, {})
    assert list(blocks(Sharing(Index("base", {})).entry("x", form, ""), form)) == []
