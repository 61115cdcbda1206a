"""The canonical form of an adapter: all that the runtime ever knows of a PEFT method.

At one module with weight W (out, in), base bias b and input x:

    y = c ⊙ (W x + b + s · B A x) + d

A (r, in) and B (out, r) are the low-rank factors, s the scale, c and d (out) a per-channel scale and bias; c = 1 and
d = 0 where a method has none. W x + b is what the base's module returns. At an embedding x is one-hot, so A's column
of a token is looked up instead of multiplied. At the parameter of a mixture of experts W, A and B are those of the
expert that the base's router chose. A norm is a module whose product is its normalised input, and takes c and d alone.
Where an adapter brings a whole weight w of its own, such as a classifier's, what the base's module returns is not used:

    y = w x + d

Tokens that it adds to the base's vocabulary have rows t of their own, at an embedding and at the output layer, whose
output grows by as many logits:

    y[V + j] = t[j] x

Knows tensors; knows no file, no PEFT key, no device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lorakit.adapters.finite import is_finite
from lorakit.errors import NonFiniteWeightsError

Kind = Literal["linear", "embedding", "norm", "experts", "router"]

WEIGHTS = ("a", "b", "w", "t")
VECTORS = ("c", "d")
ITEMS = WEIGHTS + VECTORS
"""The names of a module's tensors: matrices, which may be kept in 16 bits, and fp32 vectors."""


@dataclass(frozen=True, eq=False)
class ModuleForm:
    """One module's share of an adapter.

    Attributes:
        kind: what the module computes, "linear" (also for GPT-2's Conv1D), "embedding" or "norm"; or what a parameter
            is, "experts", a linear for each of E experts, or "router", a linear of a module that goes on from there.
        in_features: the input width; for an embedding the number of its rows (the vocabulary).
        out_features: the output width.
        a: A as (r, in); for an embedding transposed, (in, r), so that a token's lookup reads one contiguous row.
            None together with `b` for a method that has only c and d. Of experts (E, r, in), never None.
        b: B as (out, r); of experts (E, out, r).
        scale: s, applied in fp32 on the fp32 product.
        c: (out,) fp32, or None for ones, as it is for experts.
        d: (out,) fp32, or None for zeros, as it is for experts.
        w: a whole weight, (out, in), an embedding's (in, out) as `nn.Embedding` has it; None for the base's. It comes
            without A, B and c, and a scale of 1.
        t: (k, out) for an embedding, (k, in) for an output layer: the rows of the ids after the base's last. They are
            whole: A, B, c, d and w act on the base's ids alone. None where it adds none.
    """

    kind: Kind
    in_features: int
    out_features: int
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    c: torch.Tensor | None = None
    d: torch.Tensor | None = None
    w: torch.Tensor | None = None
    t: torch.Tensor | None = None

    @property
    def added(self) -> int:
        """k, the tokens that it adds."""
        return 0 if self.t is None else self.t.shape[0]

    @property
    def rank(self) -> int:
        """r, or 0 without factors."""
        return 0 if self.b is None else self.b.shape[-1]

    @property
    def experts(self) -> int:
        """E; 1 for what is no parameter of experts."""
        return self.a.shape[0] if self.kind == "experts" and self.a is not None else 1

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors there are, as (one of `ITEMS`, tensor)."""
        own = vars(self)
        return iter([(name, own[name]) for name in ITEMS if own[name] is not None])

    def __post_init__(self) -> None:
        assert (self.a is None) == (self.b is None), "A and B come together"
        assert self.w is None or (self.b is None and self.c is None and self.scale == 1), "w takes the product's place"
        assert self.kind != "norm" or (self.b is None and self.w is None and self.t is None), "a norm takes c and d"
        for name, tensor in self.tensors():
            assert tensor.shape == self._shape(name), f"{name} is {tuple(tensor.shape)}, not {self._shape(name)}"
        assert self.kind != "experts" or (self.a is not None and self.c is None and self.d is None)
        assert math.isfinite(self.scale)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor of this name has."""
        each = (self.experts,) if self.kind == "experts" else ()
        embedding = self.kind == "embedding"
        if name == "a":
            return (self.in_features, self.rank) if embedding else (*each, self.rank, self.in_features)
        if name == "b":
            return (*each, self.out_features, self.rank)
        if name == "w":
            return (self.in_features, self.out_features) if embedding else (self.out_features, self.in_features)
        if name == "t":
            return (self.added, self.out_features if embedding else self.in_features)
        return (self.out_features,)


@dataclass(frozen=True, eq=False)
class AdapterForm:
    """A whole adapter in canonical form, with what is needed to give its PEFT checkpoint back.

    Attributes:
        method: the method's short name, as `inspect` prints it ("lora", "rslora", "dora", …).
        modules: module path in the base model → its form. Paths are those of `named_modules()`, for experts and
            routers those of `named_parameters()`.
        config: the checkpoint's adapter_config.json.
        extras: tensors of the checkpoint that the form does not hold as they were (DoRA's magnitudes, under their
            PEFT keys), or that say how it held them; kept so that the checkpoint can be written back, never loaded
            for serving.
        uses_base_weights: the conversion read the base's weights, so the form is right for that base only.
        base_quantisation: how the weights that it read were quantised (`quantised.quantisation`); "" if they were not,
            or if it read none.
        svd_errors: module path → ‖ΔW − B A‖_F / ‖ΔW‖_F, of the modules whose change ΔW of the weight was approximated;
            the others are exact.
        task_id: the task that was chosen, of a method that has several; None otherwise.
    """

    method: str
    modules: Mapping[str, ModuleForm]
    config: Mapping[str, Any]
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    uses_base_weights: bool = False
    base_quantisation: str = ""
    svd_errors: Mapping[str, float] = field(default_factory=dict)
    task_id: int | None = None

    @property
    def rank(self) -> int:
        """The largest rank among the modules."""
        return max((module.rank for module in self.modules.values()), default=0)

    def check_finite(self, name: str) -> None:
        """Refuses NaN and Inf.

        Args:
            name: the adapter's name, for the message.

        Raises:
            NonFiniteWeightsError: naming the first module and tensor at fault.
        """
        for path, module in self.modules.items():
            for item, tensor in module.tensors():
                if not is_finite(tensor):
                    raise NonFiniteWeightsError(
                        f"adapter {name!r}: {named(item)} of {path} holds NaN or Inf. "
                        "Training diverged, or the file is damaged: export an earlier checkpoint."
                    )


def named(item: str) -> str:
    """A module's tensor in a message: A and B are matrices by their usual names."""
    return item.upper() if item in "ab" else item
