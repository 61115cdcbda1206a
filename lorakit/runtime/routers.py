"""Routers of experts: modules that multiply by their weight and go on from there, so that an adapter must come between.

No hook sees the product inside. So the module's forward is taken over: while the batch has an adapter there, it runs as
it is, and `torch.nn.functional.linear` with the module's own weight is given the adapters' shares. Knows modules and a
batch; no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lorakit.errors import UnsupportedMethodError
from lorakit.runtime.layers import AdaptedModule

_CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float)


class AdaptedRouter(AdaptedModule):
    """The weight of a router, and the module that multiplies by it; `path` is the weight's."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._take(path, module, "router")
        self._seen = False
        self.serve_with(self._forward)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.batch is None:
            return self.base(*args, **kwargs)
        self._seen = False
        with _Product(self):
            result = self.base(*args, **kwargs)
        if not self._seen:
            raise UnsupportedMethodError(
                f"an adapter on {self.path!r} cannot be served: its module does not multiply by it in a way that this "
                "lorakit sees."
            )
        return result

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the shares to the weight's product y (..., out) with x (..., in)."""
        assert self.batch is not None
        self._seen = True
        self.check_rows(x, self.batch.rows)
        return self.batch.add(self, y, x)


class _Product(TorchFunctionMode):
    """Gives the router what its own weight gives."""

    def __init__(self, router: AdaptedRouter) -> None:
        super().__init__()
        self._router = router
        self._casts: list[Any] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and len(args) > 1 and self._is_weight(args[1]):
            return self._router.add(result, args[0])
        if func in _CASTS and self._is_weight(args[0]):
            self._casts.append(result)
        return result

    def _is_weight(self, tensor: object) -> bool:
        # Asked for each time: accelerate puts an offloaded weight in its place inside the forward.
        return tensor is self._router.module.weight or any(tensor is cast for cast in self._casts)
