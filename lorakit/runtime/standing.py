"""Standing batches: made once, and served with other slots at each forward.

A batch of `routing.py` is made for its rows. Here rows are single tokens, as many as a forward has. Which slot each
has lies in a tensor that keeps its address: it is written before a forward, by one copy, and the forward's launches
read it. So a CUDA graph of a forward serves every mix of adapters that has its size.

What a graph cannot change `MultiLoraModel.standing_version` tells: a graph of another version must not be replayed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch

from lorakit.adapters.layout import Layout
from lorakit.runtime import ops
from lorakit.runtime.experts import AdaptedParameter
from lorakit.runtime.layers import AdaptedModule
from lorakit.runtime.pool import Slot
from lorakit.runtime.routing import Routing, tiled
from lorakit.runtime.rows import Rows
from lorakit.runtime.siblings import SiblingFinder
from lorakit.runtime.table import AddressTable
from lorakit.runtime.vocabulary import AddedTokens

_ANY = Rows((None,))
"""Rows of which nothing is known: modules may be given any number of tokens."""


class Mode(NamedTuple):
    """What the launches of a forward are made for.

    Attributes:
        dtypes: of A and B, each served by launches of its own.
        max_rank: the width of the kernels' sums.
    """

    dtypes: tuple[torch.dtype, ...]
    max_rank: int

    @classmethod
    def of(cls, adapters: Iterable[tuple[torch.dtype, Layout]]) -> Mode:
        """The mode that serves adapters of these dtypes and layouts together."""
        dtypes, layouts = zip(*adapters, strict=True)
        return cls(tuple(sorted(set(dtypes), key=str)), tiled(max(layout.ranks[-1] for layout in layouts)))


def can_stand(layout: Layout) -> bool:
    """Whether a standing batch serves adapters of a layout: A, B, c and d of linear modules, embeddings and norms."""
    return all(
        module.kind in ("linear", "embedding", "norm") and module.w is None and not module.added
        for module in layout.modules
    )


class StandingRouting(Routing):
    """The routing of some modules, for any tokens.

    Attributes:
        served: whether a forward has run with it, so that siblings are known.
    """

    def __init__(
        self,
        paths: Collection[str],
        table: AddressTable,
        finder: SiblingFinder,
        mode: Mode,
        *,
        tokens: int,
        segments: int,
        device: torch.device,
    ) -> None:
        """Serves nothing yet.

        Args:
            paths: the modules.
            table: the addresses.
            finder: is told of modules that are called alone.
            mode: what launches are made for.
            tokens: the most that a forward has.
            segments: the most slots that the tokens of a forward have.
            device: where the model computes.
        """
        super().__init__(_ANY, table, finder, AddedTokens(_ANY, {}), device=device)
        self.served = False
        self.paths = paths
        self._dtypes, self._max_rank = mode
        self._plans = torch.full((tokens, ops.PLAN_COLUMNS), -1, dtype=torch.int32, device=device)
        self._most = segments

    def set(self, slots: Sequence[Slot | None]) -> None:
        """Writes which slot each token has, in the order of the current stream."""
        for slot in dict.fromkeys(slots):
            if slot is not None:
                self._table.write(slot)
        plan = ops.plan(torch.tensor([-1 if slot is None else slot.index for slot in slots]))
        if self._plans.is_cuda:
            plan = plan.pin_memory()
        self._plans[: len(slots)].copy_(plan, non_blocking=True)
        self._tables = tuple((dtype, self._table.tensor(dtype)) for dtype in self._dtypes)

    def _plan_of(self, tokens: int) -> tuple[torch.Tensor, int]:
        # Of the size that is asked for, not one that is kept: by that a compiler would know each size apart.
        return self._plans[:tokens], min(tokens, self._most)

    def write(self, modules: Collection[AdaptedModule | AdaptedParameter]) -> None:
        """Finds the modules' columns; the table's rows are `set`'s."""
        self._columns = {module.path: self._table.column(module.path) for module in modules}
        self._tables = tuple((dtype, self._table.tensor(dtype)) for dtype in self._dtypes)


class Standing(NamedTuple):
    """The standing batch of a mode: of all modules but the output layer, and of that.

    Attributes:
        mode: what it is made for.
        body: of all modules that are given every token.
        head: of the output layer, which is given some; None where no adapter touches it.
    """

    mode: Mode
    body: StandingRouting
    head: StandingRouting | None

    @property
    def routings(self) -> list[StandingRouting]:
        """Both, or the one."""
        return [self.body] if self.head is None else [self.body, self.head]

    def set(self, slots: Sequence[Slot | None], kept: Sequence[int] | None) -> None:
        """Writes which slot each token has, before a forward and in the order of the current stream.

        Args:
            slots: of each token; held by the caller.
            kept: the places of the tokens that reach the output layer; None: all.
        """
        self.body.set(slots)
        if self.head is not None:
            self.head.set(slots if kept is None else [slots[place] for place in kept])
