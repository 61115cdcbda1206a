"""A quantised base: adapters add to what its layers return, and what reads its weights reads them dequantised."""

import contextlib
import copy
import warnings
from functools import cache

import pytest
import torch
from architectures import adapt
from peft import HRAConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from quantised_bases import KINDS, inputs, plain

import lorakit
from lorakit import AdapterBank, MultiLoraModel
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.places import places
from lorakit.errors import BaseModelNotFoundError

TARGETS = ["q_proj", "down_proj"]
PATHS = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
METHODS = {
    "lora": lambda model: adapt(model, 0, copied=False, target_modules=TARGETS),
    "dora": lambda model: adapt(model, 0, copied=False, target_modules=TARGETS, use_dora=True),
    "hra": lambda model: get_peft_model(model, HRAConfig(r=4, target_modules=TARGETS)).eval(),
}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def base(kind, folder, device):
    """The quantised model that most tests share; PEFT changes its models, so it gets others."""
    return kind(folder, device)


@cache
def source(method):
    """An adapter that PEFT made on the base before it was quantised, and that base's device."""
    torch.manual_seed(0)
    return METHODS[method](copy.deepcopy(plain()))


@torch.no_grad()
def dequantised(model, device):
    """The base in full precision, with the numbers that the quantised one computes with."""
    found, result = BaseModel.of(model), copy.deepcopy(plain()).to(device)
    for name, parameter in result.named_parameters():
        path, _, item = name.rpartition(".")
        place = found.places.get(path)
        if place is None or place.kind != "linear":
            parameter.copy_(found.parameter(name))
        else:
            parameter.copy_(found.weight(path) if item == "weight" else found.bias(path))
    return result


def same(left, right):
    assert left.modules.keys() == right.modules.keys() and left.modules
    for path, module in left.modules.items():
        other = dict(right.modules[path].tensors())
        assert all(torch.equal(tensor, other[item]) for item, tensor in module.tensors()), path
    return True


@torch.no_grad()
def test_the_weight_is_what_the_layer_multiplies_with(kind, base, device):
    assert places(base) == places(plain())
    found = BaseModel.of(base)
    assert found.quantisation == kind.name
    for path in PATHS:
        module, weight, bias = base.get_submodule(path), found.weight(path).float(), found.bias(path)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(device, base.dtype)
        expected = x.float() @ weight.T + (0 if bias is None else bias.float())
        assert relative(module(x).float(), expected) <= kind.product, path
        before = plain().get_submodule(path).weight.to(device)
        assert 1e-4 < relative(weight, before) < 0.3, "quantised, but the same base"
        assert found.parameter(f"{path}.weight") is None


@pytest.mark.parametrize("method", ["lora", "dora"])
@torch.no_grad()
def test_a_mixed_batch_is_pefts_beside_the_base(kind, base, folder, device, method):
    if method == "dora" and not kind.dora:
        pytest.skip("PEFT has no DoRA on it")
    # PEFT copies its base with the model; a quantised one is loaded twice instead of being copied.
    tenant = METHODS[method](kind(folder, device))
    model = MultiLoraModel(base)
    model.load_adapter("tenant", tenant)
    batch = inputs(3, device)
    own, expected = base(**batch).logits, tenant(**batch).logits
    mixed = model(**batch, adapter_ids=["tenant", None, "tenant"]).logits
    assert relative(mixed[[0, 2]], expected[[0, 2]]) <= kind.tolerance
    assert relative(mixed[1], own[1]) <= kind.rows
    assert relative(own[[0, 2]], expected[[0, 2]]) > 0.2, "the adapter does nothing, so nothing is tested"


@pytest.mark.parametrize("method", ["dora", "hra"])
@torch.no_grad()
def test_conversions_that_read_weights_read_them_dequantised(kind, base, device, method):
    reference = dequantised(base, device)
    form = convert("tenant", source(method), BaseModel.of(base))
    assert form.uses_base_weights and form.base_quantisation == kind.name
    assert same(form, convert("tenant", source(method), BaseModel.of(reference)))
    other = convert("tenant", source(method), BaseModel.of(plain()))
    assert other.base_quantisation == "" and not all(
        torch.equal(tensor, dict(other.modules[path].tensors())[item])
        for path, module in form.modules.items()
        for item, tensor in module.tensors()
    )
    model = MultiLoraModel(base)
    model.load_adapter("tenant", source(method))
    batch = inputs(2, device)
    mixed = model(**batch, adapter_ids=["tenant", None]).logits
    # PEFT's own, on the dequantised weights: the layers' products differ from those by `product` each.
    tenant = METHODS[method](reference)
    set_peft_model_state_dict(tenant, get_peft_model_state_dict(source(method)))
    assert relative(mixed[0], tenant(**batch).logits[0]) <= 10 * kind.product
    assert relative(mixed[1], base(**batch).logits[1]) <= kind.rows


@torch.no_grad()
def test_a_quantised_folder_is_read_dequantised(kind, base, tmp_path, folder, device):
    if not kind.saved:
        pytest.skip("transformers cannot save or load it")
    named = folder / "gptq" if "gptq" in kind.name else folder / "awq"
    if not kind.name.startswith(("gptq", "awq")):
        named = tmp_path / "base"
        base.save_pretrained(named)
    if not kind.unpacks:
        with pytest.raises(BaseModelNotFoundError, match="Put the model on a device"):
            lorakit.export({"dora": source("dora")}, tmp_path / "bank", base_model=named)
        return
    bank = lorakit.export({"dora": source("dora"), "lora": source("lora")}, tmp_path / "bank", base_model=named)
    live = lorakit.export({"dora": source("dora")}, tmp_path / "live", base_model=base)
    assert bank["dora"].base_quantisation == live["dora"].base_quantisation == kind.name
    for path, module in bank.form("dora").modules.items():
        assert relative(module.c, live.form("dora").modules[path].c) <= 1e-3
    assert MultiLoraModel(base, bank)(**inputs(1, device), adapter_ids=["dora"]).logits.isfinite().all()


# One kind is enough: the name alone decides.


@pytest.fixture(scope="module")
def quantised(folder, device):
    return KINDS["bitsandbytes-nf4"](folder, device)


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@torch.no_grad()
def test_a_bank_tells_for_which_base_its_adapters_were_computed(quantised, tmp_path, device):
    name = BaseModel.of(quantised).quantisation
    sources = {"lora": source("lora"), "dora": source("dora"), "hra": source("hra")}
    on_plain = lorakit.export(sources, tmp_path / "plain", base_model=plain())
    on_quantised = lorakit.export(sources, tmp_path / "quantised", base_model=quantised)
    on_quantised = AdapterBank.open(on_quantised.path)
    assert [entry.base_quantisation for entry in on_plain.values()] == ["", "", ""]
    assert [entry.base_quantisation for entry in on_quantised.values()] == ["", name, name]
    assert on_quantised.form("hra").base_quantisation == name
    with no_warning():
        MultiLoraModel(copy.deepcopy(plain()), on_plain)
        MultiLoraModel(quantised, on_quantised)
    with pytest.warns(UserWarning, match=f"in full precision.* quantised by {name}.* with this model") as caught:
        MultiLoraModel(quantised, on_plain)
    assert len([each for each in caught if "computed from" in str(each.message)]) == 1
    with pytest.warns(UserWarning, match=f"'dora'.* quantised by {name}.* in full precision.* as base_model"):
        MultiLoraModel(copy.deepcopy(plain()), on_quantised)


@torch.no_grad()
def test_an_adapter_that_comes_later_is_compared_too(quantised, tmp_path, device):
    bank = lorakit.export({"lora": source("lora")}, tmp_path / "bank", base_model=plain())
    with no_warning():
        model = MultiLoraModel(quantised, bank)
    bank.add("dora", source("dora"), base_model=plain())
    with pytest.warns(UserWarning, match="'dora'"):
        model(**inputs(1, device), adapter_ids="dora")


@torch.no_grad()
def test_what_reads_no_weights_is_served_on_any_base(quantised, tmp_path, device):
    bank = lorakit.export({"tenant": source("lora")}, tmp_path / "bank", base_model=plain())
    with no_warning():
        model = MultiLoraModel(quantised, bank)
    batch = inputs(2, device)
    mixed, own = model(**batch, adapter_ids=["tenant", None]).logits, quantised(**batch).logits
    assert mixed.isfinite().all() and torch.equal(mixed[1], own[1]) and relative(own[0], mixed[0]) > 0.2
