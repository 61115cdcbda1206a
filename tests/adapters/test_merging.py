"""Weighted sums of a bank's adapters: PEFT's `add_weighted_adapter` gives the same."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, adapt
from forms import lora_form, make_bank, module_form, odd_form
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft_folders import base_of, relative, save, small, tree

import lorakit
from lorakit import MultiLoraModel
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.merging import COMBINATIONS, Recipe, module_seed
from lorakit.errors import (
    AdapterExistsError,
    AdapterNameError,
    AdapterNotFoundError,
    ConfigError,
    LorakitError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnsupportedMethodError,
)

PRUNING = [name for name in COMBINATIONS if name not in ("linear", "cat", "svd")]
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of equal rank on modules that overlap in part, an embedding among them; and `odd`, of many ranks."""
    root = tmp_path_factory.mktemp("folders")
    save(small(1, target_modules=["q_proj", "down_proj", "embed_tokens"]), root / "a")
    save(small(2, target_modules=["q_proj", "v_proj"], lora_alpha=9, use_rslora=True), root / "b")
    save(small(3, target_modules=["v_proj", "embed_tokens"], lora_alpha=-3), root / "c")
    pattern = {r"layers\.1\.self_attn\.q_proj": 6}
    save(small(4, target_modules=["q_proj", "o_proj"], r=3, rank_pattern=pattern), root / "odd")
    return root


@pytest.fixture
def bank(folders: Path, tmp_path: Path) -> AdapterBank:
    names = ["a", "b", "c", "odd"]
    return lorakit.export({name: folders / name for name in names}, tmp_path / "bank", base_model=base_of())


def of_peft(folders: Path, weights: dict[str, float], seed: int | None = None, **options: Any) -> PeftModel:
    """PEFT's sum, active; with a seed each module draws from a generator of its own, as ours do."""
    names = [f"tenant-{name}" for name in weights]
    first, *others = weights
    model = PeftModel.from_pretrained(copy.deepcopy(base_of()), folders / first, adapter_name=names[0])
    for name in others:
        model.load_adapter(folders / name, f"tenant-{name}")
    lora: LoraModel = model.base_model
    if seed is not None:
        paths = {id(module): path for path, module in lora.model.named_modules()}

        def seeded(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            target = next(arg for arg in args if isinstance(arg, LoraLayer))
            torch.manual_seed(module_seed(seed, paths[id(target)]))
            return original(*args, **kwargs)

        for kind in ("", "_svd"):
            method = f"{kind}_generalized_task_arithmetic_weighted_adapter"
            setattr(lora, method, partial(seeded, getattr(lora, method)))
    lora.add_weighted_adapter(names, list(weights.values()), "mix", **options)
    model.set_adapter("mix")
    return model.eval()


def products(model: PeftModel, name: str = "mix") -> dict[str, torch.Tensor]:
    """Module → what PEFT adds to its weight, as (out, in)."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A):
            product = module.get_delta_weight(name).detach()
            found[path] = product.T if name in module.lora_embedding_A else product
    return found


def product(module: ModuleForm) -> torch.Tensor:
    assert module.a is not None and module.b is not None
    a = module.a.T if module.kind == "embedding" else module.a
    return module.scale * module.b.float() @ a.float()


def assert_equal(form: AdapterForm, expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert form.modules.keys() == expected.keys()
    for path, module in form.modules.items():
        assert relative(product(module), expected[path]) <= tolerance, path


@torch.no_grad()
def assert_served_and_loaded(bank: AdapterBank, folder: Path, reference: PeftModel, tolerance: float = 1e-5) -> None:
    """The entry `mix`: lorakit serves it, PEFT loads it, and lorakit takes it in again, all to the same output."""
    bank.verify()
    inputs = ARCHITECTURES["llama"].inputs(2)
    expected = reference(**inputs).logits
    assert relative(base_of()(**inputs).logits, expected) > 1e-3, "the sum does nothing, so nothing is tested"
    served = MultiLoraModel(copy.deepcopy(base_of()), bank)
    assert relative(served(**inputs, adapter_ids="mix").logits, expected) <= tolerance
    bank.export_peft("mix", folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_of()), folder).eval()
    assert relative(loaded(**inputs).logits, expected) <= tolerance
    bank.add("again", folder, base_model=base_of())
    assert bank["again"].layout == bank["mix"].layout and bank["again"].blake3 == bank["mix"].blake3


# The same as PEFT


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_as_peft(folders: Path, bank: AdapterBank, tmp_path: Path, combination: str) -> None:
    seed = 5 if "dare" in combination else None
    options: dict[str, Any] = {"density": 0.6} if combination in PRUNING else {}
    # PEFT's rsLoRA scales the sum once more if it comes first: `b` does not.
    reference = of_peft(folders, WEIGHTS, seed, combination_type=combination, **options)
    bank.merge("mix", WEIGHTS, combination=combination, seed=seed or 0, **options)
    assert_equal(bank.form("mix"), products(reference))
    assert bank["mix"].source.startswith("0.7*a + -0.4*b + 1.3*c (" + combination)
    assert_served_and_loaded(bank, tmp_path / "out", reference)


@pytest.mark.parametrize("combination", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_elections_as_peft(folders: Path, bank: AdapterBank, combination: str) -> None:
    options: dict[str, Any] = {"density": 0.4, "majority_sign_method": "frequency"}
    reference = of_peft(folders, WEIGHTS, 0, combination_type=combination, **options)
    bank.merge("mix", WEIGHTS, combination=combination, **options)
    assert_equal(bank.form("mix"), products(reference))


@pytest.mark.parametrize(
    ("combination", "rank"), [("cat", None), ("svd", None), ("svd", 2), ("svd", 5), ("ties_svd", None), ("ties_svd", 5)]
)
def test_different_ranks_as_peft(
    folders: Path, bank: AdapterBank, tmp_path: Path, combination: str, rank: int | None
) -> None:
    weights = {"a": 0.7, "odd": -0.5, "b": 0.2}
    options: dict[str, Any] = {"density": 0.5} if combination in PRUNING else {}
    reference = of_peft(folders, weights, combination_type=combination, svd_rank=rank, **options)
    bank.merge("mix", weights, combination=combination, rank=rank, **options)
    assert_equal(bank.form("mix"), products(reference))
    ranks = {path: module.rank for path, module in bank.form("mix").modules.items()}
    if combination == "cat":
        # PEFT fills up with zeros; here no module is larger than its sum.
        assert ranks["model.layers.1.self_attn.q_proj"] == 14 and ranks["model.layers.1.self_attn.o_proj"] == 3
    else:
        assert max(ranks.values()) == (rank or 6)
    assert_served_and_loaded(bank, tmp_path / "out", reference)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weight", [0.5, -2.0])
def test_one_adapter_is_multiplied(
    folders: Path, bank: AdapterBank, tmp_path: Path, combination: str, weight: float
) -> None:
    reference = of_peft(folders, {"a": weight}, combination_type=combination)
    bank.merge("mix", {"a": weight}, combination=combination)
    assert_equal(bank.form("mix"), products(reference))
    assert_equal(bank.form("mix"), {path: weight * product(m) for path, m in bank.form("a").modules.items()})
    assert_served_and_loaded(bank, tmp_path / "out", reference)


def test_factors_of_linear_are_those_of_peft(folders: Path, bank: AdapterBank) -> None:
    reference = of_peft(folders, WEIGHTS, combination_type="linear")
    bank.merge("mix", WEIGHTS, combination="linear")
    path = "model.layers.0.self_attn.q_proj"
    module = reference.get_submodule(f"base_model.model.{path}")
    form = bank.form("mix").modules[path]
    assert form.a is not None and form.b is not None and form.scale == 1
    torch.testing.assert_close(form.a, module.lora_A["mix"].weight.detach())
    torch.testing.assert_close(form.b, module.lora_B["mix"].weight.detach())


def test_conv1d(tmp_path: Path) -> None:
    """PEFT's weights lie the other way there."""
    for seed, name in enumerate("ab"):
        tenant = adapt(base_of("gpt2"), seed, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
        save(tenant, tmp_path / name)
    bank = lorakit.export([tmp_path / "a", tmp_path / "b"], tmp_path / "bank", base_model=base_of("gpt2"))
    forms = [bank.form(name).modules for name in "ab"]
    expected = {path: 0.7 * product(forms[0][path]) + 0.3 * product(forms[1][path]) for path in forms[0]}
    for combination, rank in (("cat", None), ("svd", 8)):
        bank.merge("mix", {"a": 0.7, "b": 0.3}, combination=combination, rank=rank, overwrite=True)
        assert_equal(bank.form("mix"), expected)
    bank.export_peft("mix", tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_of("gpt2")), tmp_path / "out").eval()
    inputs = ARCHITECTURES["gpt2"].inputs(2)
    served = MultiLoraModel(copy.deepcopy(base_of("gpt2")), bank)
    with torch.no_grad():
        assert relative(served(**inputs, adapter_ids="mix").logits, loaded(**inputs).logits) <= 1e-5


# What is ours


def test_rslora_is_not_scaled_twice(folders: Path, bank: AdapterBank) -> None:
    """PEFT keeps rsLoRA's scale, the root of the rank, for a sum in which the scales are already."""
    bank.merge("mix", {"b": 0.5, "a": 0.5}, combination="cat")
    forms = {name: bank.form(name).modules for name in "ab"}
    path = "model.layers.0.self_attn.q_proj"
    expected = 0.5 * product(forms["a"][path]) + 0.5 * product(forms["b"][path])
    assert relative(product(bank.form("mix").modules[path]), expected) <= 1e-5
    peft = products(of_peft(folders, {"b": 0.5, "a": 0.5}, combination_type="cat"))[path]
    assert relative(peft, math.sqrt(8) * expected) <= 1e-5


def test_seeds(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    state = torch.get_rng_state()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        bank.merge(name, {"a": 1, "b": 1}, combination="dare_linear", density=0.5, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert bank["one"].blake3 == bank["same"].blake3 != bank["other"].blake3
    modules = list(bank.form("one").modules.values())
    assert modules[0].a is not None and modules[1].a is not None
    assert not torch.equal(modules[0].a == 0, modules[1].a == 0), "modules drop values of their own"


def test_biases_add_up(tmp_path: Path) -> None:
    for seed, (name, targets) in enumerate({"a": ["q_proj"], "b": ["q_proj", "k_proj"]}.items()):
        save(small(seed, target_modules=targets, lora_bias=True), tmp_path / name)
    save(small(2, target_modules=["v_proj"]), tmp_path / "plain")
    save(small(3, target_modules=["embed_tokens"]), tmp_path / "tokens")
    names = ["a", "b", "plain", "tokens"]
    bank = lorakit.export([tmp_path / name for name in names], tmp_path / "bank", base_model=base_of())
    weights = {"a": 0.7, "b": -0.4, "plain": 1.0}
    bank.merge("mix", weights, combination="cat")
    forms = {name: bank.form(name).modules for name in [*weights, "mix"]}
    for path, module in forms["mix"].items():
        biases = [weights[name] * forms[name][path].d for name in "ab" if path in forms[name]]
        torch.testing.assert_close(module.d, sum(biases, torch.zeros(module.out_features)))
    bank.export_peft("mix", tmp_path / "out")
    inputs = ARCHITECTURES["llama"].inputs(2)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base_of()), tmp_path / "out").eval()
    with torch.no_grad():
        served = MultiLoraModel(copy.deepcopy(base_of()), bank)(**inputs, adapter_ids="mix").logits
        assert relative(served, loaded(**inputs).logits) <= 1e-5
    bank.add("again", tmp_path / "out", base_model=base_of())
    bank.merge("half", {"a": 0.5})
    torch.testing.assert_close(
        bank.form("half").modules["model.layers.0.self_attn.q_proj"].d,
        0.5 * forms["a"]["model.layers.0.self_attn.q_proj"].d,
    )
    with pytest.raises(UnsupportedMethodError, match=r"'a' has a bias .* model.layers.0.self_attn.q_proj.*'cat'"):
        bank.merge("x", weights, combination="linear")
    with pytest.raises(UnsupportedMethodError, match=r"'a' has a bias .*'tokens' is on the embedding .*leave one"):
        bank.merge("x", {"a": 1, "tokens": 1}, combination="cat")


def test_dtypes(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0, dtype=torch.bfloat16), b=lora_form(1, dtype=torch.float16))
    weights = {"a": 0.7, "b": 0.3}
    bank.merge("exact", weights, combination="cat")
    bank.merge("half", weights, combination="cat", dtype=torch.bfloat16)
    assert (bank["exact"].dtype, bank["half"].dtype) == (torch.float32, torch.bfloat16)
    path = "model.layers.0.self_attn.q_proj"
    forms = {name: bank.form(name).modules[path] for name in bank}
    expected = 0.7 * product(forms["a"]) + 0.3 * product(forms["b"])
    assert relative(product(forms["exact"]), expected) <= 1e-6
    assert 1e-4 < relative(product(forms["half"]), expected) < 1e-2


def test_a_rank_that_no_module_can_have(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    for combination, density, rank in (("svd", None, 8), ("ties_svd", 0.9, 24)):
        bank.merge(combination, {"a": 1, "b": 2}, combination=combination, density=density, rank=1000)
        assert bank[combination].ranks == (rank,)


def test_factors_of_other_methods(tmp_path: Path) -> None:
    """Their products can be summed; their factors, one by one, mean nothing to a LoRA's."""
    other = dataclasses.replace(lora_form(1), method="loha", config={"peft_type": "LOHA", "r": 2})
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=other)
    before = tree(tmp_path / "bank")
    with pytest.raises(
        UnsupportedMethodError, match=r"'b' is of the method 'loha', whose .*q_proj.*use 'cat' or 'svd'"
    ):
        bank.merge("mix", {"a": 1, "b": 1}, combination="linear")
    assert tree(tmp_path / "bank") == before
    path = "model.layers.0.self_attn.q_proj"
    for combination, rank in (("cat", None), ("svd", 8)):
        bank.merge("mix", {"a": 1, "b": 1}, combination=combination, rank=rank, overwrite=True)
        forms = {name: bank.form(name) for name in bank}
        expected = product(forms["a"].modules[path]) + product(forms["b"].modules[path])
        assert relative(product(forms["mix"].modules[path]), expected) <= 1e-5
        assert (forms["mix"].method, forms["mix"].config["peft_type"]) == ("lora", "LORA")


def test_overwrite(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    first = bank.form("a").modules["model.layers.0.self_attn.q_proj"]
    bank.merge("a", {"a": 2}, overwrite=True)
    assert relative(product(bank.form("a").modules["model.layers.0.self_attn.q_proj"]), 2 * product(first)) < 1e-6
    assert bank.names == ["a", "b"] and bank["a"].source == "2*a (cat)"


# What is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "a"}, AdapterExistsError, "'a' is in the bank already.*overwrite=True"),
        ({"name": "a/b"}, AdapterNameError, "'a/b' cannot be"),
        ({"weights": {}}, ConfigError, "weights are missing"),
        ({"weights": ["a"]}, ConfigError, "weights are missing"),
        ({"weights": {"a": 1, "x": 1}}, AdapterNotFoundError, "no adapter 'x' in bank"),
        ({"weights": {"a": 1, "b": math.nan}}, ConfigError, "weight of adapter 'b' is nan; give a finite"),
        ({"weights": {"a": -math.inf, "b": 1}}, ConfigError, "weight of adapter 'a' is -inf"),
        ({"weights": {"a": 10**400, "b": 1}}, ConfigError, "weight of adapter 'a' is 1000"),
        ({"weights": {"a": "1", "b": 1}}, ConfigError, "weight of adapter 'a' is '1'"),
        ({"weights": {"a": True, "b": 1}}, ConfigError, "weight of adapter 'a' is True"),
        ({"combination": "mean"}, ConfigError, "combination 'mean' is unknown; use one of linear, cat, svd, ties"),
        ({"combination": None}, ConfigError, "combination None is unknown"),
        *(({"combination": name}, ConfigError, f"'{name}' needs a density") for name in PRUNING),
        *(
            ({"combination": "ties", "density": density}, ConfigError, f"density is {density!r}; give a number above 0")
            for density in (0, -0.1, 1.01, math.nan, "0.5", True)
        ),
        ({"density": 0.5}, ConfigError, "'cat' prunes nothing; leave density out"),
        ({"rank": 4}, ConfigError, "'cat' finds its rank itself; leave rank out"),
        ({"combination": "svd", "rank": 0}, ConfigError, "rank is 0; give a whole number"),
        ({"combination": "svd", "rank": 2.0}, ConfigError, "rank is 2.0; give a whole number"),
        ({"majority_sign_method": "all"}, ConfigError, "majority_sign_method is 'all'; use one of total, freq"),
        ({"seed": 0.5}, ConfigError, "seed is 0.5; give a whole number"),
        ({"dtype": torch.float64}, ConfigError, "dtype is torch.float64; use"),
        ({"weights": {"a": 1}, "combination": "ties", "density": 0.5}, ConfigError, "'a' is alone.*give more"),
        ({"weights": {"a": 1}, "combination": "svd", "rank": 2}, ConfigError, "'a' is alone.*leave combination"),
        (
            {"weights": {"a": 1, "wide": 1}, "combination": "linear"},
            ConfigError,
            "has rank 8 in adapter 'wide' and 4 in 'a'.*'cat' or 'svd'",
        ),
        ({"weights": {"a": 1, "dora": 1}}, UnsupportedMethodError, "'dora' scales the channels of .*leave it out"),
        ({"weights": {"a": 1, "ia3": 1}}, UnsupportedMethodError, "'ia3' scales the channels of m, .*leave it out"),
        ({"weights": {"ia3": 1}}, UnsupportedMethodError, "'ia3' scales the channels of m, .*leave it out"),
        ({"weights": {"a": 1, "bias": 1}}, UnsupportedMethodError, "'bias' has no low-rank factors at m, .*leave it"),
        ({"weights": {"a": 1, "big": 1}}, ShapeMismatchError, "is another module in adapter 'big' than in 'a'"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], error: type[LorakitError], message: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scaled = {"m": module_form(generator, factors=False, c=True)}
    biased = {"m": module_form(generator, factors=False, d=True)}
    bank = make_bank(
        tmp_path / "bank",
        a=lora_form(0),
        b=lora_form(1),
        wide=lora_form(2, rank=8),
        big=lora_form(3, hidden=32),
        dora=odd_form(),
        ia3=AdapterForm("ia3", scaled, {"peft_type": "IA3"}),
        bias=AdapterForm("other", biased, {"peft_type": "OTHER"}),
    )
    before = tree(tmp_path / "bank")
    arguments: dict[str, Any] = {"name": "mix", "weights": {"a": 0.7, "b": 0.3}, **options}
    with pytest.raises(error, match=message):
        bank.merge(arguments.pop("name"), arguments.pop("weights"), **arguments)
    assert tree(tmp_path / "bank") == before


def test_sums_out_of_range(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    before = tree(tmp_path / "bank")
    for combination, weight, dtype in (
        ("cat", 1e38, None),
        ("cat", 1e7, torch.float16),
        ("svd", 1e38, None),
        ("ties_svd", 1e39, None),
        ("linear", 1e300, None),
    ):
        density = 0.5 if combination == "ties_svd" else None
        with pytest.raises(NonFiniteWeightsError, match=r"'mix': A of .* would hold .*; use smaller weights"):
            bank.merge("mix", {"a": weight, "b": 1}, combination=combination, density=density, dtype=dtype)
    assert tree(tmp_path / "bank") == before and bank.names == ["a", "b"]


def test_another_process_is_seen(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))
    AdapterBank.open(tmp_path / "bank").merge("mix", {"a": 1, "b": 1})
    with pytest.raises(AdapterExistsError):
        bank.merge("mix", {"a": 1, "b": 1})
    AdapterBank.open(tmp_path / "bank").remove("b")
    with pytest.raises(AdapterNotFoundError):
        bank.merge("other", {"a": 1, "b": 1})


def test_a_recipe_shows_itself() -> None:
    assert str(Recipe({"a": 0.5, "b": -1}, "ties", density=0.25)) == "0.5*a + -1*b (ties, density 0.25)"
