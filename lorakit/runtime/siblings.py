"""Siblings: modules that are given the same input (q, k and v; gate and up), served by the same two launches.

Nothing is known of names: who they are is seen in a batch's first forward, and checked again at every call. The first
of them to be called computes all their products and all their adapters' shares; the others find theirs done. Where
bits need not be the base's own, one launch computes the products too (`ops.linears`), also in a batch without adapters.
Knows modules and a batch; no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import nn

from lorakit.runtime import ops
from lorakit.runtime.layers import AdaptedModule, is_plain_linear


class GroupBatch(Protocol):
    """A batch that serves siblings together."""

    def add(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `layers.Batch`."""

    def add_together(
        self, modules: Sequence[AdaptedModule], ys: Sequence[torch.Tensor], x: torch.Tensor
    ) -> list[torch.Tensor]:
        """Adds the adapters' shares at modules that were given x (..., in) and returned ys (..., out)."""


class Siblings:
    """One to four modules in the order of their calls, each called with x and nothing else.

    Attributes:
        modules: the siblings.
        batch: the batch now in the model, if one of its adapters touches one of them.
        joins: whether one launch may compute their products, whose bits may then not be the base's own.
    """

    def __init__(self, modules: Sequence[AdaptedModule]) -> None:
        """Takes the modules' forwards over."""
        assert 1 <= len(modules) <= ops.MOST_SIBLINGS
        self.modules = tuple(modules)
        self.batch: GroupBatch | None = None
        self.joins = False
        self._plain = _are_plain(modules)
        self._together = True
        self._x: torch.Tensor | None = None
        self._version: int | None = None
        self._done: dict[int, torch.Tensor] = {}
        for index, module in enumerate(modules):
            module.serve_with(partial(self._forward, index))

    def forget(self) -> None:
        """Lets go of outputs that nobody asked for."""
        self._x = None
        self._done = {}

    def _forward(self, index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The forward of one of the modules."""
        module, batch = self.modules[index], self.batch
        if batch is None and not self.joins:
            return module.base(*args, **kwargs)
        x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        if batch is None and not self._can_join(x):
            return module.base(*args, **kwargs)
        if len(args) + len(kwargs) != 1:
            y = module.base(*args, **kwargs)
            return y if batch is None else batch.add(module, y, x)
        if self._x is x and self._version == version(x) and index in self._done:
            y = self._done.pop(index)
            if not self._done:
                self._x = None
            return y
        if self._done:
            # Some sibling was not called with this input after all: from now on each computes its own alone.
            self._together = False
            self.forget()
        if not self._together:
            return self._outputs([module], x)[0]
        ys = self._outputs(self.modules, x)
        self._done = {other: y for other, y in enumerate(ys) if other != index}
        self._x, self._version = (x, version(x)) if self._done else (None, None)
        return ys[index]

    def _outputs(self, modules: Sequence[AdaptedModule], x: torch.Tensor) -> list[torch.Tensor]:
        ys = self._joined(x) if self._can_join(x) else [module.base(x) for module in modules]
        return ys if self.batch is None else self.batch.add_together(modules, ys, x)

    def _can_join(self, x: torch.Tensor) -> bool:
        return self.joins and self._plain and self._together and ops.can_join(x, self._weights)

    def _joined(self, x: torch.Tensor) -> list[torch.Tensor]:
        biases = [cast(torch.Tensor, module.module.bias) for module in self.modules if module.module.bias is not None]
        ys = ops.linears(x.reshape(-1, x.shape[-1]).contiguous(), self._weights, biases)
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]

    @property
    def _weights(self) -> list[torch.Tensor]:
        return [cast(torch.Tensor, module.module.weight) for module in self.modules]


def _are_plain(modules: Sequence[AdaptedModule]) -> bool:
    """Whether modules compute what their weights say and nothing else: not quantised, wrapped or parametrised."""
    plain = all(is_plain_linear(module.module) and _is_own(module.base) for module in modules)
    return plain and len({module.module.bias is None for module in modules}) == 1


def _is_own(forward: Callable[..., Any]) -> bool:
    """Whether a forward is the class's own; or another model's on the same base, which is not in use meanwhile."""
    if isinstance(forward, partial) and isinstance(other := getattr(forward.func, "__self__", None), Siblings):
        return _is_own(other.modules[forward.args[0]].base)
    return getattr(forward, "__func__", None) is nn.Linear.forward


def version(x: torch.Tensor) -> int | None:
    """Counts x's changes in place, where that is counted: not in inference mode, and not while a model is compiled."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class SiblingFinder:
    """Sees which modules are called one after another with the same input."""

    def __init__(self) -> None:
        self._runs: list[list[AdaptedModule]] = []
        self._seen: set[int] = set()
        self._x: torch.Tensor | None = None
        self._version: int | None = None

    def see(self, module: AdaptedModule, x: torch.Tensor) -> None:
        """Notes a call; of the inputs only the last is kept."""
        # By the module itself: one that lies at two paths has no forward to be taken over twice.
        if id(module.module) in self._seen:
            self._x = None  # called twice: what follows is no longer the first forward
            return
        self._seen.add(id(module.module))
        if self._x is not x or self._version != version(x) or len(self._runs[-1]) == ops.MOST_SIBLINGS:
            self._runs.append([])
        self._runs[-1].append(module)
        self._x, self._version = x, version(x)

    def found(self) -> Iterator[Siblings]:
        """The siblings seen since the last call; their forwards are taken over."""
        runs, self._runs, self._x = self._runs, [], None
        for run in runs:
            yield Siblings(run)
