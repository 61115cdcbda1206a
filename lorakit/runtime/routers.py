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

    joins = False

    def __init__(self, path: str, module: nn.Module) -> None:
        self._take(path, module, embedding=False)
        self.serve_with(self._forward)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.batch is None:
            return self.base(*args, **kwargs)
        with _Product(self) as product:
            result = self.base(*args, **kwargs)
        if not product.seen:
            raise UnsupportedMethodError(
                f"an adapter on {self.path!r} cannot be served: its module does not multiply by it in a way that this "
                "lorakit sees."
            )
        return result


class _Product(TorchFunctionMode):
    """Adds the shares to what the router's own weight gives.

    Attributes:
        seen: how many times it was multiplied by.
    """

    def __init__(self, router: AdaptedRouter) -> None:
        super().__init__()
        self.seen = 0
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
            batch, x = self._router.batch, args[0]
            assert batch is not None
            self._router.check_rows(x, len(batch.slots))
            self.seen += 1
            return batch.add(self._router, result, x)
        if func in _CASTS and self._is_weight(args[0]):
            self._casts.append(result)
        return result

    def _is_weight(self, tensor: object) -> bool:
        # Asked for each time: accelerate puts an offloaded weight in its place inside the forward.
        return tensor is self._router.module.weight or any(tensor is cast for cast in self._casts)
