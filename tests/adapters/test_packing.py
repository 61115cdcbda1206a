"""An adapter's blocks: the same bytes whatever their size, and no NaN or Inf among them."""

from __future__ import annotations

import pytest
import torch
from forms import lora_form, odd_form

from lorakit.adapters import packing
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.index import Index
from lorakit.adapters.layout import Extent, stored
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


@pytest.mark.parametrize("size", [1, packing.BLOCK_BYTES])
@pytest.mark.parametrize("item", ["a", "b", "c", "d"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch, item: str, size: int, value: float) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", size)
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


def test_an_adapter_without_tensors() -> None:
    form = AdapterForm("lora", {}, {})
    assert list(blocks(Sharing(Index("base", {})).entry("x", form, ""), form)) == []
