from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from forms import assert_same_form, lora_form, module_form, odd_form, same_bits
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.layout import ALIGNMENT, Extent, Layout, natural_key, weight_dtype
from lorakit.errors import BankError


def test_modules_lie_in_natural_order() -> None:
    paths = ["layers.10.q", "layers.2.q", "layers.2.k", "embed", "layers.02.q"]
    assert sorted(paths, key=natural_key) == ["embed", "layers.2.k", "layers.02.q", "layers.2.q", "layers.10.q"]
    # A number of any length is no problem.
    assert natural_key("x" + "9" * 10_000)


def test_order_of_the_form_does_not_matter() -> None:
    form = odd_form()
    turned = AdapterForm(form.method, dict(reversed(form.modules.items())), form.config)
    assert Layout.of(form) == Layout.of(turned)
    assert Layout.of(form).key == Layout.of(turned).key


@pytest.mark.parametrize("seed", range(10))
def test_tensors_are_aligned_and_apart(seed: int) -> None:
    layout = Layout.of(odd_form(seed))
    for spans, end in (
        (layout.weight_spans, layout.weights_elements),
        (layout.vector_spans, layout.vector_elements),
    ):
        place = 0
        for span in spans:
            assert span.offset % ALIGNMENT == 0
            assert span.offset >= place
            place = span.end
        assert place <= end < place + ALIGNMENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_and_views_round_trip(dtype: torch.dtype) -> None:
    form = odd_form(3, dtype)
    layout = Layout.of(form)
    weights, vectors = layout.pack(form, dtype)
    assert weights.shape == (layout.weights_elements,) and vectors.shape == (layout.vector_elements,)
    assert weights.nbytes + vectors.nbytes == layout.nbytes(dtype)
    views = layout.views(weights, vectors)
    assert_same_form(replace(form, modules=views), form)
    # They are views: a change of the extent shows.
    weights.zero_()
    assert not views["model.embed_tokens"].b.any()


def test_offsets_hold_after_a_cast() -> None:
    form = odd_form(1, torch.float32)
    layout = Layout.of(form)
    weights, vectors = layout.pack(form, torch.float32)
    for path, module in layout.views(weights.to(torch.bfloat16), vectors).items():
        if module.a is not None:
            assert same_bits(module.a, form.modules[path].a.to(torch.bfloat16))


def test_weight_dtypes_promote_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    half = module_form(generator, dtype=torch.float16)
    brain = module_form(generator, dtype=torch.bfloat16)
    vectors = module_form(generator, factors=False, c=True)
    assert weight_dtype(AdapterForm("lora", {"x": half, "y": half}, {})) == torch.float16
    assert weight_dtype(AdapterForm("lora", {"x": half, "y": brain}, {})) == torch.float32
    assert weight_dtype(AdapterForm("ia3", {"x": vectors}, {})) == torch.float32


def test_extent_sees_bytes() -> None:
    form = odd_form(5)
    layout = Layout.of(form)
    weights, vectors = layout.pack(form, torch.bfloat16)
    buffer = torch.cat([weights.view(torch.uint8), vectors.view(torch.uint8), torch.ones(3, dtype=torch.uint8)])
    extent = Extent.of_bytes(layout, torch.bfloat16, buffer)
    assert same_bits(extent.weights, weights) and same_bits(extent.vectors, vectors)
    assert (extent.dtype, extent.nbytes) == (torch.bfloat16, buffer.numel() - 3)


def test_numbers() -> None:
    layout = Layout.of(lora_form(layers=3, hidden=24, rank=4))
    assert layout.parameters == 3 * 2 * 2 * 4 * 24
    assert layout.ranks == (4,)
    assert Layout.of(AdapterForm("beft", {}, {})).ranks == (0,)
    assert Layout.of(AdapterForm("beft", {}, {})).nbytes(torch.float32) == 0


@given(seed=st.integers(0, 1000))
def test_json_round_trip(seed: int) -> None:
    layout = Layout.of(odd_form(seed))
    again = Layout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout and again.key == layout.key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", ""),
        ("path", "\ud800"),
        ("kind", "conv"),
        ("in", 0),
        ("in", 1 << 60),
        ("out", -3),
        ("rank", True),
        ("rank", 1 << 39),
        ("scale", float("nan")),
        ("scale", 10**400),
        ("scale", "2"),
        ("a", 4),
        ("a", 1 << 40),
        ("b", 0),
        ("b", None),
        ("c", 0),
        ("t", 0),
        ("added", 3),
    ],
)
def test_wrong_modules_are_refused(field: str, value: object) -> None:
    layout = Layout.of(lora_form()).to_json()
    layout["modules"][1][field] = value
    with pytest.raises(BankError, match="layout"):
        Layout.from_json(layout)


def test_rows_of_added_tokens_lie_behind_the_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    modules = {
        "embed": ModuleForm("embedding", 20, 8, t=torch.randn(3, 8, generator=generator)),
        "head": replace(
            module_form(generator, in_features=8, out_features=20), t=torch.randn(3, 8, generator=generator)
        ),
    }
    form = AdapterForm("lora", modules, {})
    layout = Layout.of(form)
    assert Layout.from_json(layout.to_json()) == layout
    assert [module.added for module in layout.modules] == [3, 3]
    assert_same_form(AdapterForm("lora", layout.views(*layout.pack(form, torch.float32)), {}), form)
    for change in ({"added": 0}, {"added": None}, {"added": 1 << 39}, {"t": 1 << 40}, {"kind": "norm"}):
        wrong = layout.to_json()
        wrong["modules"][0] |= change
        with pytest.raises(BankError, match="layout"):
            Layout.from_json(wrong)


def test_wrong_layouts_are_refused() -> None:
    good = Layout.of(lora_form()).to_json()
    for change in ({"weights": 8}, {"weights": -8}, {"vectors": 4}, {"modules": {}}, {"modules": good["modules"] * 2}):
        with pytest.raises(BankError):
            Layout.from_json({**good, **change})
    without_b = json.loads(json.dumps(good))
    del without_b["modules"][0]["b"]
    with pytest.raises(BankError, match="both a and b"):
        Layout.from_json(without_b)


def of_experts() -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON of a layout, and of its module that is of experts."""
    layout = Layout.of(odd_form()).to_json()
    return layout, next(module for module in layout["modules"] if module["kind"] == "experts")


def test_experts_lie_one_after_another_and_b_transposed() -> None:
    form = odd_form(dtype=torch.float32)
    extent = Extent.of_form(form)
    module = next(module for module in extent.layout.modules if module.kind == "experts")
    source = form.modules[module.path]
    assert module.experts == source.experts == 5 and source.rank == 3
    for at, factor in ((module.a, source.a), (module.b, source.b.mT)):
        for expert in range(5):
            begin = at + expert * factor[expert].numel()
            assert torch.equal(extent.weights[begin : begin + factor[expert].numel()], factor[expert].flatten())


@pytest.mark.parametrize("value", [0, "5", None, 1 << 39])
def test_wrong_experts_are_refused(value: object) -> None:
    layout, module = of_experts()
    module["experts"] = value
    with pytest.raises(BankError, match="layout"):
        Layout.from_json(layout)


def test_experts_have_factors_and_nothing_else() -> None:
    layout, module = of_experts()
    module["c"] = 0
    with pytest.raises(BankError, match="of experts.*a and b alone"):
        Layout.from_json(layout)
    layout, module = of_experts()
    del module["a"], module["b"]
    module["rank"] = 0
    with pytest.raises(BankError, match="of experts.*a and b alone"):
        Layout.from_json(layout)


def test_a_whole_weight_of_another_scale_is_no_layout() -> None:
    value = Layout.of(odd_form(3)).to_json()
    module = next(module for module in value["modules"] if "w" in module)
    module["scale"] = 2.0
    with pytest.raises(BankError, match="has a w, which takes the place of a, b and c, and a scale of 1"):
        Layout.from_json(value)
