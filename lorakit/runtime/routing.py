"""Routing: a batch whose rows find their adapters in device memory, by kernels.

Made once a batch from the slot of each row, in one small copy to the device; nothing is stacked, padded or moved.
Knows slots, rows and modules; no name and no request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from lorakit.runtime import ops
from lorakit.runtime.experts import AdaptedParameter, Pairs
from lorakit.runtime.layers import AdaptedModule
from lorakit.runtime.rows import Rows
from lorakit.runtime.siblings import SiblingFinder
from lorakit.runtime.table import AddressTable
from lorakit.runtime.vocabulary import AddedTokens


class _ExpertTable(NamedTuple):
    """Where a parameter of experts finds its factors of one dtype: a table with a row a slot and expert, its column."""

    dtype: torch.dtype
    table: torch.Tensor
    column: int


class Routing:
    """The plan of a batch, and the table by which its rows find their adapters.

    Attributes:
        rows: the rows, and the slot of each.
        paths: the modules that some row's adapter touches.
        added: the tokens that adapters add to the vocabulary.
    """

    def __init__(
        self, rows: Rows, table: AddressTable, finder: SiblingFinder, added: AddedTokens, *, device: torch.device
    ) -> None:
        """Makes the plan.

        Args:
            rows: their slots are held until the batch is done.
            table: the addresses; rows that are out of date are written.
            finder: is told of modules that are called alone.
            added: the tokens that adapters add to the vocabulary.
            device: where the model computes.
        """
        self.rows = rows
        self.paths: Collection[str] = rows.touched
        used = rows.used
        self._table = table
        self._finder = finder
        self.added = added
        self._dtypes = tuple(dict.fromkeys(slot.dtype for slot in used))
        self._max_rank = tiled(max((slot.layout.ranks[-1] for slot in used), default=0))
        # Modules for which some row's adapter brings a whole weight.
        self._whole = {module.path for slot in used for module in slot.layout.modules if module.w is not None}
        self._columns: dict[str, int] = {}
        self._experts: dict[str, list[_ExpertTable]] = {}
        # Single tokens are many, and of few slots; rounded up, so that few kernels are compiled.
        self._segments = min(len(rows.slots), max(16, 1 << (len(used) - 1).bit_length())) if rows.exact else 0
        slots = torch.tensor([-1 if slot is None else slot.index for slot in rows.slots])
        self._plan = ops.plan(slots).to(device)

    def write(self, modules: Collection[AdaptedModule | AdaptedParameter]) -> None:
        """Brings the table up to date: slots may have moved since the last batch.

        Args:
            modules: those that this batch will meet, `paths` and their siblings.
        """
        self._columns = {module.path: self._table.column(module.path) for module in modules}
        for slot in self.rows.used:
            self._table.write(slot)
        self._tables = tuple((dtype, self._table.tensor(dtype)) for dtype in self._dtypes)
        parameters = [module for module in modules if isinstance(module, AdaptedParameter)]
        self._experts = {parameter.path: [] for parameter in parameters}
        for experts in {parameter.place.experts for parameter in parameters}:
            alike = [parameter.path for parameter in parameters if parameter.place.experts == experts]
            for dtype in self._dtypes:
                table = self._table.experts(dtype, [self._columns[path] for path in alike], experts)
                for column, path in enumerate(alike):
                    self._experts[path].append(_ExpertTable(dtype, table, column))

    def add(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share at a module. See `layers.Batch`."""
        if module.kind == "linear" and not torch.compiler.is_compiling():
            self._finder.see(module, x)
        y = y.contiguous()
        if module.kind == "embedding":
            self._expand([module], [y], self._look_up(module, x))
        elif module.kind == "norm":
            self._expand([module], [y], [self._nothing(y) for _ in self._tables])
        else:
            self._expand([module], [y], self._shrink([module], x))
        self._replace(module, y, x)
        return self._widened(module, y, x)

    def add_together(
        self, modules: Sequence[AdaptedModule], ys: Sequence[torch.Tensor], x: torch.Tensor
    ) -> list[torch.Tensor]:
        """Adds the adapters' shares at siblings. See `siblings.GroupBatch`."""
        for module in modules:
            module.check_rows(x, self.rows)
        ys = [y.contiguous() for y in ys]
        self._expand(modules, ys, self._shrink(modules, x))
        for module, y in zip(modules, ys, strict=True):
            self._replace(module, y, x)
        return [self._widened(module, y, x) for module, y in zip(modules, ys, strict=True)]

    def _widened(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.added.widen(module, y, x) if module.path in self.added and not module.embedding else y

    def _plan_of(self, tokens: int) -> tuple[torch.Tensor, int]:
        """The plan of so many tokens, and the most segments that it has; 0: as many as rows."""
        return self._plan, self._segments

    def _look_up(self, module: AdaptedModule, ids: torch.Tensor) -> list[torch.Tensor]:
        column, tokens = self._columns[module.path], ids.reshape(-1)
        plan, _ = self._plan_of(len(tokens))
        return [ops.lookup(tokens, table, plan, column, self._max_rank, dtype) for dtype, table in self._tables]

    def _nothing(self, y: torch.Tensor) -> torch.Tensor:
        """Sums that nobody reads: a norm has no factors."""
        return y.new_empty((1, y.numel() // y.shape[-1], 1, self._max_rank), dtype=torch.float32)

    def route(self, pairs: Pairs) -> torch.Tensor:
        """The plan of pairs, each a row of its own, in one slot an adapter and expert. See `experts.ExpertsBatch`."""
        return ops.plan(pairs.keys(self._plan[:, 0]))

    def add_experts(
        self, parameter: AdaptedParameter, y: torch.Tensor, x: torch.Tensor, routed: torch.Tensor
    ) -> torch.Tensor:
        """Adds the adapters' shares at a parameter of experts. See `experts.ExpertsBatch`."""
        x, y = x.contiguous(), y.contiguous()
        for dtype, table, column in self._experts[parameter.path]:
            h = ops.shrink(x, table, routed, [column], self._max_rank, dtype)
            ops.expand_([y], h, table, routed, [column], dtype)
        return y

    def _shrink(self, modules: Sequence[AdaptedModule], x: torch.Tensor) -> list[torch.Tensor]:
        columns = [self._columns[module.path] for module in modules]
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        plan, segments = self._plan_of(len(tokens))
        return [
            ops.shrink(tokens, table, plan, columns, self._max_rank, dtype, segments) for dtype, table in self._tables
        ]

    def _expand(
        self, modules: Sequence[AdaptedModule], ys: Sequence[torch.Tensor], sums: Sequence[torch.Tensor]
    ) -> None:
        columns = [self._columns[module.path] for module in modules]
        tokens = [y.view(-1, y.shape[-1]) for y in ys]
        plan, segments = self._plan_of(len(tokens[0]))
        for h, (dtype, table) in zip(sums, self._tables, strict=True):
            if len({y.dtype for y in ys}) == 1:
                ops.expand_(tokens, h, table, plan, columns, dtype, segments)
                continue
            for i, y in enumerate(tokens):  # a launch writes one dtype
                ops.expand_([y], h[i : i + 1], table, plan, columns[i : i + 1], dtype, segments)

    def _replace(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> None:
        if module.path in self._whole:
            column = self._columns[module.path]
            given = x.reshape(-1) if module.embedding else x.reshape(-1, x.shape[-1]).contiguous()
            plan, segments = self._plan_of(len(given))
            for dtype, table in self._tables:
                ops.replace_(y.view(-1, y.shape[-1]), given, table, plan, column, dtype, segments)


def tiled(rank: int) -> int:
    """The width of the kernels' sums: few different ones, since each is compiled apart."""
    return max(ops.RANKS, 1 << (rank - 1).bit_length()) if rank else ops.RANKS
