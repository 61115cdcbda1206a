"""Mixtures of experts: what makes a module of experts multi-adapter.

An adapter's share must be added before the activation, where no hook sees it. So the module's forward is taken over,
and only while the batch has an adapter there: it computes the base's two products for every pair of a token and an
expert that was chosen for it, with transformers' own functions, and asks the batch for the shares. Without adapters
there the module's own forward runs. Knows transformers' interface of experts and a batch; no adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from lorakit.adapters.layout import ALIGNMENT
from lorakit.adapters.places import Place, expert_places_of
from lorakit.errors import AdapterIdsError, UnsupportedMethodError
from lorakit.runtime.layers import device_of

try:
    from transformers.integrations import moe as _moe
except ImportError:  # before transformers 5
    _moe = None


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a token and an expert in one call of a module, in the order in which they are computed.

    Attributes:
        path: the module's path.
        tokens: how many tokens there are, row-major over the batch's rows.
        token: (pairs,) int64, the token of each pair.
        expert: (pairs,) int64, its expert.
        experts: how many experts there are.
    """

    path: str
    tokens: int
    token: torch.Tensor
    expert: torch.Tensor
    experts: int

    def keys(self, rows: torch.Tensor) -> torch.Tensor:
        """One number for each pair's adapter and expert, number · experts + expert; -1 for the base.

        Args:
            rows: (rows,) of any integer dtype, the number of each row's adapter, -1 for the base.

        Returns:
            (pairs,) of the rows' dtype.

        Raises:
            AdapterIdsError: the rows cannot have the same number of tokens each.
        """
        number = self._of_tokens(rows)[self.token]
        return torch.where(number < 0, -1, number * self.experts + self.expert.to(rows.dtype))

    def _of_tokens(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of each token's adapter: (tokens,)."""
        count = rows.shape[0]
        if self.tokens % count:
            raise AdapterIdsError(
                f"{self.path} was given {self.tokens} tokens for {count} adapter_ids: the model does not feed it row "
                "by row, so adapters on it cannot share a batch; give all rows one adapter."
            )
        return rows.unsqueeze(1).expand(-1, self.tokens // count).reshape(-1)


class ExpertsBatch(Protocol):
    """A batch that serves experts."""

    def route(self, pairs: Pairs) -> Any:
        """Finds the adapter of each pair; what it gives is for `add_experts`, at every parameter of the module."""

    def add_experts(self, parameter: AdaptedParameter, y: torch.Tensor, x: torch.Tensor, routed: Any) -> torch.Tensor:
        """Adds the adapters' shares at a parameter.

        Args:
            parameter: one that some row's adapter touches.
            y: (pairs, out), the base's products; may be overwritten.
            x: (pairs, in), what they were made from.
            routed: what `route` gave for these pairs.

        Returns:
            (pairs, out), in y's dtype.
        """


class AdaptedParameter:
    """One parameter of a module of experts.

    Attributes:
        path: the parameter's path.
        place: its sizes.
        module: the module of experts.
        batch: the batch now in the model, if one of its adapters touches this parameter.
    """

    embedding = False
    output_scale = 1.0

    def __init__(self, path: str, place: Place, module: nn.Module) -> None:
        self.path = path
        self.place = place
        self.module = module
        self.batch: Any = None

    @property
    def device(self) -> torch.device:
        """Where the module computes."""
        return device_of(self.module)

    @property
    def aligned(self) -> bool:
        """Whether every expert's factors begin where kernels can load them, whatever the rank."""
        return self.place.in_features % ALIGNMENT == self.place.out_features % ALIGNMENT == 0


class AdaptedExperts:
    """One module of experts, its forward taken over.

    Attributes:
        path: the module's path.
        parameters: the parameters of its two products, by name, in their order.
        base: its forward without this model's adapters.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        """Takes the forward over.

        Raises:
            UnsupportedMethodError: the module has no interface by which its experts could be served.
        """
        places = expert_places_of(module)
        if obstacle := _obstacle(module, places):
            raise UnsupportedMethodError(f"adapters on the experts of {path!r} cannot be served: {obstacle}.")
        self.path = path
        self.parameters: Mapping[str, AdaptedParameter] = {
            name: AdaptedParameter(f"{path}.{name}", place, module) for name, place in places.items()
        }
        self._module: Any = module
        # accelerate keeps the forward that it wraps: inside of it, weights and inputs are where they are computed.
        forward = "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"
        self.base: Callable[..., torch.Tensor] = getattr(module, forward)
        setattr(module, forward, self._forward)

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        batch = next((parameter.batch for parameter in self.parameters.values() if parameter.batch is not None), None)
        if batch is None:
            return self.base(*args, **kwargs)
        if kwargs:  # models call their arguments by names of their own
            args = inspect.signature(type(self._module).forward).bind(self._module, *args, **kwargs).args[1:]
        return self._serve(batch, *args)

    def _serve(self, batch: ExpertsBatch, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What `batched_mm_experts_forward` and `grouped_mm_experts_forward` of transformers compute, and the shares.

        Args:
            batch: the batch.
            x: (tokens, hidden).
            chosen: (tokens, k), the experts of each token.
            weights: (tokens, k), theirs.

        Returns:
            (tokens, hidden).
        """
        module, (tokens, k) = self._module, chosen.shape
        grouped = module.config._experts_implementation != "batched_mm"
        expert, order = torch.sort(chosen.reshape(-1)) if grouped else (chosen.reshape(-1), None)
        place = torch.arange(tokens * k, device=x.device)
        token = (place if order is None else order) // k
        routed = batch.route(Pairs(self.path, tokens, token, expert, module.num_experts))
        ends = None
        if grouped:
            every = torch.arange(module.num_experts, device=x.device)
            ends = torch.searchsorted(expert, every, right=True).to(torch.int32)

        up, down = self.parameters.items()
        y = self._product(batch, *up, x[token], expert, ends, routed)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._product(batch, *down, y, expert, ends, routed)
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)
        weight = weights.reshape(-1, 1)
        y = y * (weight if order is None else weight[order])
        if order is not None:
            y = y[torch.empty_like(order).index_copy_(0, order, place)]
        return y.view(tokens, k, -1).sum(dim=1).to(x.dtype)

    def _product(
        self,
        batch: ExpertsBatch,
        name: str,
        parameter: AdaptedParameter,
        x: torch.Tensor,
        expert: torch.Tensor,
        ends: torch.Tensor | None,
        routed: Any,
    ) -> torch.Tensor:
        """One product of every pair, (pairs, in) → (pairs, out); with `ends`, pairs are sorted by their expert."""
        module = self._module
        weight, transposed = getattr(module, name), module.is_transposed
        bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
        if ends is None:
            y = _moe._batched_linear(x, weight[expert], bias=bias, is_transposed=transposed)
        else:
            y = _moe._grouped_linear(x, weight, offs=ends, bias=bias, is_transposed=transposed)
        return y if parameter.batch is None else batch.add_experts(parameter, y, x, routed)


def _obstacle(module: nn.Module, places: Mapping[str, Place]) -> str:
    """Why a module's experts cannot be served; empty if they can."""
    if not places:
        return "they are packed by a quantiser, or have not the interface of experts of transformers 5"
    if not all(hasattr(_moe, name) for name in ("_grouped_linear", "_batched_linear")):
        return f"transformers {transformers.__version__} computes them in a way that this lorakit does not know"
    if getattr(module, "_is_expert_parallel", False):
        return "they are spread over several devices"
    return ""
