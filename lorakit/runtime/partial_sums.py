"""Partial sums: where adapters act at a linear module whose inputs are shared out over the processes.

transformers gives each process of a tensor-parallel base some columns of W. What a process multiplies is a part of the
sum over the inputs, and the parts are added up (all-reduced) within the module's own forward, where no hook sees them.
So the forward is taken over, by the same steps of transformers' own style, and the product in its middle gets the
hooks. One addition over the processes serves base and adapters. Knows a module and its style; no adapter.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from lorakit.adapters.sharded import whole


class Style(Protocol):
    """What is used of transformers' `TensorParallelLayer`."""

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: Any, kwargs: Any, mesh: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gives a process its part of the input."""

    def context_around_forward(self, module: nn.Module, mesh: Any) -> Any:
        """Within it the module's parameters are this process's."""

    def transform_output_post_forward(self, module: nn.Module, output: torch.Tensor, mesh: Any) -> torch.Tensor:
        """Adds up the parts."""


class PartialSums(nn.Module):
    """The product of a linear module, (..., in) → (..., out) for the inputs of this process, before parts are added up.

    It is no submodule of the base: its hooks and its `forward` stand in for those of the linear, whose own see the sum.
    The linear's bias is in the first process's part, since an adapter may scale it. Where there is one, outputs are
    rounded in another order than without adapters.
    """

    def __init__(self, linear: nn.Linear, style: Style, mesh: Any) -> None:
        """Takes the linear's forward over.

        Args:
            linear: to whose forward transformers has applied the style.
            style: a row-wise one.
            mesh: of the processes, of one dimension.
        """
        super().__init__()
        # Not as a submodule or parameters: these are the base's.
        self.__dict__["_linear"] = linear
        self._style = style
        self._mesh = mesh
        self._bias: list[torch.Tensor] = []
        linear.forward = self.summed  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part; not to be called but by `summed`."""
        linear: nn.Linear = self.__dict__["_linear"]
        # The forward of its class: that of the module is `summed`.
        y: torch.Tensor = type(linear).forward(linear, x)
        return y + self._bias[0] if self._bias else y

    def summed(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The linear's forward, hooks and all; gradients are not wanted."""
        linear, mesh = self.__dict__["_linear"], self._mesh
        bias = linear._parameters.get("bias")
        if bias is not None:
            linear._parameters["bias"] = None
            self._bias = [whole(bias)] if mesh.get_local_rank() == 0 else []
        try:
            args, kwargs = self._style.transform_inputs_pre_forward(linear, args, kwargs, mesh)
            with self._style.context_around_forward(linear, mesh):
                part = self(*args, **kwargs)
            return self._style.transform_output_post_forward(linear, part, mesh)
        finally:
            if bias is not None:
                linear._parameters["bias"] = bias
                self._bias = []


def partial_sums_of(linear: nn.Linear, style: Style, mesh: Any) -> PartialSums:
    """Those of a linear, which are made once, also where several models wrap its base."""
    owner = getattr(linear.forward, "__self__", None)
    return owner if isinstance(owner, PartialSums) else PartialSums(linear, style, mesh)
