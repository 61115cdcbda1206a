"""The canonical form of an adapter: all that the runtime ever knows of a PEFT method.

At one module with weight W (out, in), base bias b and input x:

    y = c ⊙ (W x + b + s · B A x) + d

A (r, in) and B (out, r) are the low-rank factors, s the scale, c and d (out) a per-channel scale and bias; c = 1 and
d = 0 where a method has none. W x + b is what the base's module returns. At an embedding x is one-hot, so A's column
of a token is looked up instead of multiplied. At the parameter of a mixture of experts W, A and B are those of the
expert that the base's router chose.

Knows tensors; knows no file, no PEFT key, no device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lorakit.errors import NonFiniteWeightsError

Kind = Literal["linear", "embedding", "experts", "router"]


@dataclass(frozen=True, eq=False)
class ModuleForm:
    """One module's share of an adapter.

    Attributes:
        kind: what the module computes, "linear" (also for GPT-2's Conv1D) or "embedding"; or what a parameter is,
            "experts", a linear for each of E experts, or "router", a linear of a module that goes on from there.
        in_features: the input width; for an embedding the number of its rows (the vocabulary).
        out_features: the output width.
        a: A as (r, in); for an embedding transposed, (in, r), so that a token's lookup reads one contiguous row.
            None together with `b` for a method that has only c and d. Of experts (E, r, in), never None.
        b: B as (out, r); of experts (E, out, r).
        scale: s, applied in fp32 on the fp32 product.
        c: (out,) fp32, or None for ones, as it is for experts.
        d: (out,) fp32, or None for zeros, as it is for experts.
    """

    kind: Kind
    in_features: int
    out_features: int
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    c: torch.Tensor | None = None
    d: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r, or 0 without factors."""
        return 0 if self.b is None else self.b.shape[-1]

    @property
    def experts(self) -> int:
        """E; 1 for what is no parameter of experts."""
        return self.a.shape[0] if self.kind == "experts" and self.a is not None else 1

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors there are, as ("a" | "b" | "c" | "d", tensor)."""
        for name in ("a", "b", "c", "d"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor

    def __post_init__(self) -> None:
        assert (self.a is None) == (self.b is None), "A and B come together"
        r = self.rank
        each = (self.experts,) if self.kind == "experts" else ()
        shapes = {
            "a": (self.in_features, r) if self.kind == "embedding" else (*each, r, self.in_features),
            "b": (*each, self.out_features, r),
            "c": (self.out_features,),
            "d": (self.out_features,),
        }
        for name, tensor in self.tensors():
            assert tuple(tensor.shape) == shapes[name], f"{name} is {tuple(tensor.shape)}, not {shapes[name]}"
        assert self.kind != "experts" or (self.a is not None and self.c is None and self.d is None)
        assert math.isfinite(self.scale)


@dataclass(frozen=True, eq=False)
class AdapterForm:
    """A whole adapter in canonical form, with what is needed to give its PEFT checkpoint back.

    Attributes:
        method: the method's short name, as `inspect` prints it ("lora", "rslora", "dora", …).
        modules: module path in the base model → its form. Paths are those of `named_modules()`, for experts and
            routers those of `named_parameters()`.
        config: the checkpoint's adapter_config.json.
        extras: tensors of the checkpoint that the form does not hold as they were (DoRA's magnitudes, under their
            PEFT keys); kept so that the checkpoint can be written back, never loaded for serving.
        uses_base_weights: the conversion read the base's weights, so the form is right for that base only.
    """

    method: str
    modules: Mapping[str, ModuleForm]
    config: Mapping[str, Any]
    extras: Mapping[str, torch.Tensor] = field(default_factory=dict)
    uses_base_weights: bool = False

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
                # A sum is finite only if every element is, save for overflow: one cheap pass, then the exact test.
                if not math.isfinite(tensor.sum(dtype=torch.float32).item()) and not tensor.isfinite().all():
                    raise NonFiniteWeightsError(
                        f"adapter {name!r}: {item.upper() if item in 'ab' else item} of {path} holds NaN or Inf. "
                        "Training diverged, or the file is damaged: export an earlier checkpoint."
                    )
