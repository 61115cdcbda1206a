"""Weighted sums of adapters: several forms → one form that is a plain LoRA, with s = 1.

Knows the canonical form, and what a sum of it can be; opens no file. PEFT's `LoraModel.add_weighted_adapter` is the
source of every combination, and its functions (`peft.utils.merge_utils`) do the arithmetic. With w an adapter's
weight, s its scale and ΔW = s · B A, module by module over the adapters that have it:

    linear, ties, dare_*, magnitude_prune   A = f(Aᵢ; σᵢ √|wᵢ sᵢ|) and B = f(Bᵢ; √|wᵢ sᵢ|), with σᵢ the sign of wᵢ sᵢ
    cat                                     A = [wᵢ sᵢ Aᵢ] and B = [Bᵢ], one beside another: Σ wᵢ ΔWᵢ, exactly
    svd, *_svd                              the best B A of a rank to f(ΔWᵢ; wᵢ), by its singular values

f is PEFT's function of that name; for linear and svd a weighted sum.

Sources: Ilharco et al. 2022, task arithmetic (arXiv 2212.04089); Yadav et al. 2023, TIES (arXiv 2306.01708); Yu et al.
2023, DARE (arXiv 2311.03099).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from peft.utils import merge_utils

from lorakit.adapters.convert import cast, check_dtype
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.form import AdapterForm, Kind, ModuleForm
from lorakit.adapters.layout import ModuleLayout
from lorakit.errors import ConfigError, NonFiniteWeightsError, ShapeMismatchError, UnsupportedMethodError

_ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_ON_PRODUCTS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATIONS = ("linear", "cat", "svd", *_ON_FACTORS[1:], *_ON_PRODUCTS[1:])
"""PEFT's combination types."""

_PLAIN = ("lora", "rslora")  # methods whose factors are those that were trained
_WHOLE = ("linear", "cat", "svd")  # prune nothing
_SIGNS = ("total", "frequency")
# What a merged configuration takes from the first adapter that says it: none changes what it computes.
_KEPT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
# PEFT's key of an adapter's own bias, under the module's path.
_BIAS = "lora_B.bias"


# What the index says of a module and of an adapter, or these themselves: a check needs what both say alike.
Shape: TypeAlias = ModuleLayout | ModuleForm
Adapter: TypeAlias = AdapterEntry | AdapterForm


@dataclass(frozen=True)
class Recipe:
    """How adapters are summed. Making one refuses arguments that cannot be.

    Attributes:
        weights: adapter → weight, of any sign.
        combination: one of `COMBINATIONS`.
        rank: of a sum by singular values; None for the largest rank among the adapters.
        density: the share of values that pruning keeps.
        majority_sign_method: how TIES elects a sign, "total" or "frequency".
        seed: of the values that DARE drops.
        dtype: what A and B are stored in; None for float32, in which they are computed.

    Raises:
        ConfigError: naming the argument at fault.
    """

    weights: Mapping[str, float]
    combination: str = "cat"
    rank: int | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise ConfigError('weights are missing: give each adapter of the sum one, as {"a": 0.7, "b": 0.3}.')
        for name, weight in self.weights.items():
            if not _is_number(weight):
                raise ConfigError(f"the weight of adapter {name!r} is {weight!r}; give a finite number.")
        if self.combination not in COMBINATIONS:
            raise ConfigError(f"combination {self.combination!r} is unknown; use one of {', '.join(COMBINATIONS)}.")
        if len(self.weights) == 1 and (self.combination not in _WHOLE or self.rank is not None):
            # PEFT would overlook what was asked for.
            raise ConfigError(
                f"adapter {next(iter(self.weights))!r} is alone, so it is only multiplied by its weight, as PEFT does; "
                "give more adapters, or leave combination, rank and density out."
            )
        self._check_rank()
        self._check_density()
        if self.majority_sign_method not in _SIGNS:
            raise ConfigError(f"majority_sign_method is {self.majority_sign_method!r}; use one of {', '.join(_SIGNS)}.")
        if type(self.seed) is not int:
            raise ConfigError(f"seed is {self.seed!r}; give a whole number.")
        check_dtype(self.dtype)

    def _check_rank(self) -> None:
        if self.rank is None:
            return
        if self.combination not in _ON_PRODUCTS:
            raise ConfigError(
                f"combination {self.combination!r} finds its rank itself; leave rank out, or use one of "
                f"{', '.join(_ON_PRODUCTS)}."
            )
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank is {self.rank!r}; give a whole number of at least 1.")

    def _check_density(self) -> None:
        if self.combination in _WHOLE:
            if self.density is not None:
                raise ConfigError(
                    f"combination {self.combination!r} prunes nothing; leave density out, or use one of "
                    f"{', '.join(name for name in COMBINATIONS if name not in _WHOLE)}."
                )
        elif self.density is None:
            raise ConfigError(f"combination {self.combination!r} needs a density: the share of values to keep, as 0.5.")
        elif not _is_number(self.density) or not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density!r}; give a number above 0, and of at most 1.")

    @property
    def _applied(self) -> str:
        """The combination, save that one adapter is only multiplied by its weight."""
        return self.combination if len(self.weights) > 1 else "linear"

    def __str__(self) -> str:
        terms = " + ".join(f"{weight:g}*{name}" for name, weight in self.weights.items())
        options = [f"density {self.density:g}"] if self.density is not None else []
        return f"{terms} ({', '.join([self.combination, *options])})"

    def check(self, adapters: Mapping[str, Adapter]) -> None:
        """Refuses adapters whose sum by this recipe is no plain LoRA. No tensor is read.

        Args:
            adapters: name → adapter, of all that have a weight.

        Raises:
            UnsupportedMethodError: a module has a channel scale, or a bias that this combination cannot keep, or a
                method's factors have no meaning one by one.
            ConfigError: ranks differ where they must be equal.
            ShapeMismatchError: a module differs from adapter to adapter.
        """
        firsts: dict[str, tuple[str, Shape]] = {}
        biased: tuple[str, str] | None = None
        embedding: tuple[str, str] | None = None
        for name, adapter in adapters.items():
            for path, module in _shapes(adapter):
                self._check_module(name, path, module)
                first, other = firsts.setdefault(path, (name, module))
                if module.d is not None:
                    biased = biased or (name, path)
                if module.kind == "embedding":
                    embedding = embedding or (name, path)
                if _place(module) != _place(other):
                    raise ShapeMismatchError(
                        f"{path} is another module in adapter {name!r} than in {first!r}: they are of different bases."
                    )
                if self._applied in _ON_FACTORS and module.rank != other.rank:
                    raise ConfigError(
                        f"{path} has rank {module.rank} in adapter {name!r} and {other.rank} in {first!r}, and "
                        f"combination {self.combination!r} needs equal ones; use 'cat' or 'svd'."
                    )
            method = "trainable_token_indices" if adapter.config.get("trainable_token_indices") else adapter.method
            if self._applied in _ON_FACTORS and method not in _PLAIN and len(adapters) > 1:
                raise UnsupportedMethodError(
                    f"adapter {name!r} is of the method {method!r}, whose factors at {_shapes(adapter)[0][0]} "
                    f"and elsewhere are no LoRA's, as combination {self.combination!r} needs them; use 'cat' or 'svd'."
                )
        if biased and embedding:
            raise UnsupportedMethodError(
                f"adapter {biased[0]!r} has a bias of its own at {biased[1]}, and {embedding[0]!r} is on the embedding "
                f"{embedding[1]}: PEFT takes no such LoRA; leave one of them out of the weights."
            )

    def _check_module(self, name: str, path: str, module: Shape) -> None:
        if module.c is not None:
            raise UnsupportedMethodError(
                f"adapter {name!r} scales the channels of {path}, as DoRA and IA3 do, so the sum would be no plain "
                "LoRA; leave it out of the weights."
            )
        if module.added:
            raise UnsupportedMethodError(
                f"adapter {name!r} adds tokens to the vocabulary at {path}, so the sum would be no plain LoRA; leave "
                "it out of the weights."
            )
        if not module.rank:
            raise UnsupportedMethodError(
                f"adapter {name!r} has no low-rank factors at {path}, so the sum would be no plain LoRA; leave it out "
                "of the weights."
            )
        if module.d is not None and self._applied != "cat" and len(self.weights) > 1:
            raise UnsupportedMethodError(
                f"adapter {name!r} has a bias of its own at {path}, which combination {self.combination!r} would lose; "
                "use 'cat', which adds biases up, or leave it out of the weights."
            )

    def merge(self, name: str, forms: Mapping[str, AdapterForm]) -> AdapterForm:
        """The sum.

        Args:
            name: of the new adapter, for messages.
            forms: adapter → form, of all that have a weight.

        Raises:
            NonFiniteWeightsError: a sum has NaN, or values larger than its dtype holds.
            UnsupportedMethodError, ConfigError, ShapeMismatchError: as `check`.
        """
        self.check(forms)
        paths = dict.fromkeys(path for form in forms.values() for path in form.modules)
        biased = any(module.d is not None for form in forms.values() for module in form.modules.values())
        rank = self.rank or max(map(_configured_rank, forms.values()))
        modules = {}
        for path in paths:
            there = [
                (float(weight), forms[adapter].modules[path])
                for adapter, weight in self.weights.items()
                if path in forms[adapter].modules
            ]
            modules[path] = self._module(path, there, rank, biased)
        merged = AdapterForm(
            method="lora",
            modules=modules,
            config=_config([form.config for form in forms.values()], modules, biased),
            extras={f"{path}.{_BIAS}": module.d for path, module in modules.items() if module.d is not None},
            uses_base_weights=any(form.uses_base_weights for form in forms.values()),
            base_quantisation=_base_quantisation(forms.values()),
        )
        merged = cast(merged, self.dtype or torch.float32)
        _check_finite(merged, name)
        return merged

    def _module(self, path: str, there: list[tuple[float, ModuleForm]], rank: int, biased: bool) -> ModuleForm:
        """One module's sum, over the adapters that have it."""
        first = there[0][1]
        factors = [_factors(module) for _, module in there]
        scales = [weight * module.scale for weight, module in there]
        if self._applied == "cat":
            a = torch.cat([scale * a for scale, (a, _) in zip(scales, factors, strict=True)])
            b = torch.cat([b for _, b in factors], dim=1)
        elif self._applied == "svd":
            a, b = _truncated_sum(factors, scales, rank)
        else:
            # PEFT's functions draw from torch's own generator, which is left as it was.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(module_seed(self.seed, path))
                if self._applied in _ON_FACTORS:
                    a, b = self._on_factors(factors, scales)
                else:
                    a, b = self._on_products(there, factors, rank)
        d = None
        if biased:  # PEFT's lora_bias gives one to every module
            d = torch.zeros(first.out_features)
            for weight, module in there:
                if module.d is not None:
                    d += weight * module.d
        embedding = first.kind == "embedding"
        return ModuleForm(first.kind, first.in_features, first.out_features, a.T if embedding else a, b, d=d)

    def _on_factors(
        self, factors: list[tuple[torch.Tensor, torch.Tensor]], scales: list[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        combine = self._combine()
        a = combine([a for a, _ in factors], torch.tensor(signed))
        return a, combine([b for _, b in factors], torch.tensor(roots))

    def _on_products(
        self, there: list[tuple[float, ModuleForm]], factors: list[tuple[torch.Tensor, torch.Tensor]], rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = there[0][1].kind == "embedding"
        products = [(b @ a) * module.scale for (a, b), (_, module) in zip(factors, there, strict=True)]
        # As PEFT's: an embedding's lies as its weight does, which matters to the values that DARE drops.
        products = [product.T if embedding else product for product in products]
        summed = self._combine()(products, torch.tensor([weight for weight, _ in there]))
        u, s, vh = _svd(summed.T if embedding else summed)
        return vh[:rank], u[:, :rank] * s[:rank]

    def _combine(self) -> Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]:
        """PEFT's function of tensors and their weights."""
        name = self._applied.removesuffix("_svd")
        if name == "linear":
            return merge_utils.task_arithmetic
        function = getattr(merge_utils, name)
        options = {"majority_sign_method": self.majority_sign_method} if "ties" in name else {}
        return lambda tensors, weights: function(tensors, weights, self.density, **options)


def module_seed(seed: int, path: str) -> int:
    """A module's own seed, so that what is dropped in one does not depend on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {path}".encode()).digest()[:8], "big")


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _shapes(adapter: Adapter) -> list[tuple[str, Shape]]:
    """Module path → its shape."""
    if isinstance(adapter, AdapterEntry):
        return [(module.path, module) for module in adapter.layout.modules]
    return list(adapter.modules.items())


def _place(module: Shape) -> tuple[Kind, int, int]:
    return module.kind, module.in_features, module.out_features


def _factors(module: ModuleForm) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) as PEFT has them, in float32."""
    assert module.a is not None and module.b is not None, "checked before"
    a = module.a.T if module.kind == "embedding" else module.a
    return a.float(), module.b.float()


def _truncated_sum(
    factors: list[tuple[torch.Tensor, torch.Tensor]], scales: list[float], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A and B of a rank to Σ s · B A.

    By the singular values of a small core between orthogonal bases of all A and of all B: the same result as PEFT's,
    which decomposes the whole product, at a cost that grows with the module's sides and not with their product.
    """
    q_a, r_a = torch.linalg.qr(torch.cat([scale * a for scale, (a, _) in zip(scales, factors, strict=True)]).T)
    q_b, r_b = torch.linalg.qr(torch.cat([b for _, b in factors], dim=1))
    u, s, vh = _svd(r_b @ r_a.T)
    return vh[:rank] @ q_a.T, q_b @ (u[:, :rank] * s[:rank])


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if matrix.isfinite().all():
        return torch.linalg.svd(matrix, full_matrices=False)
    # torch would refuse it in words of its own: the sum is refused at its end.
    nan = torch.full_like(matrix, math.nan)
    least = min(matrix.shape)
    return nan[:, :least], nan.flatten()[:least], nan[:least]


def _base_quantisation(forms: Iterable[AdapterForm]) -> str:
    """That of the base that the forms were computed from; of several all, since the sum is right for none alone."""
    found = sorted({form.base_quantisation for form in forms if form.uses_base_weights})
    return found[0] if len(found) == 1 else " and ".join(name or "none" for name in found)


def _configured_rank(form: AdapterForm) -> int:
    """The largest rank of an adapter as PEFT counts it: also one that no module has."""
    config = form.config
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()] if _is_lora(config) else []
    return max([form.rank, *(rank for rank in ranks if type(rank) is int)])


def _is_lora(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type")).upper() == "LORA"


def _config(configs: list[Mapping[str, Any]], modules: Mapping[str, ModuleForm], biased: bool) -> dict[str, Any]:
    """The adapter_config.json by which PEFT loads these modules: s is 1, so every alpha is its rank."""
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    # PEFT looks for a pattern at a path's end; from the path's start it names one module.
    pattern = {f"^{re.escape(path)}": module.rank for path, module in modules.items() if module.rank != rank}
    kept = {key: next((config[key] for config in configs if config.get(key) is not None), None) for key in _KEPT}
    return {
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": list(modules),
        "fan_in_fan_out": any(bool(config.get("fan_in_fan_out")) for config in configs),
        "lora_bias": biased,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _check_finite(form: AdapterForm, name: str) -> None:
    for path, module in form.modules.items():
        for item, tensor in module.tensors():
            if not tensor.isfinite().all():
                raise NonFiniteWeightsError(
                    f"adapter {name!r}: {item.upper() if item in 'ab' else item} of {path} would hold NaN, or values "
                    f"larger than {str(tensor.dtype).removeprefix('torch.')} does; use smaller weights or float32, and "
                    "make sure by verify that the bank is sound."
                )
