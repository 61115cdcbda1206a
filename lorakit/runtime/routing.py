"""Routing: a batch whose rows find their adapters in device memory, by kernels.

Made once a batch from the slot of each row, in one small copy to the device; nothing is stacked, padded or moved.
Knows slots and rows; no name and no request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from lorakit.runtime import ops
from lorakit.runtime.layers import AdaptedModule
from lorakit.runtime.pool import Slot
from lorakit.runtime.table import AddressTable


class Routing:
    """The plan of a batch, and the table by which its rows find their adapters.

    Attributes:
        slots: the slot of each row, None for the base.
        paths: the modules that some row's adapter touches.
    """

    def __init__(self, slots: Sequence[Slot | None], table: AddressTable, *, device: torch.device) -> None:
        """Makes the plan.

        Args:
            slots: the slot of each row; held until the batch is done.
            table: the addresses; rows that are out of date are written.
            device: where the model computes.
        """
        self.slots = tuple(slots)
        used = {slot.index: slot for slot in self.slots if slot is not None}.values()
        self.paths: Collection[str] = dict.fromkeys(module.path for slot in used for module in slot.layout.modules)
        self._table = table
        self._columns = {path: table.column(path) for path in self.paths}
        self._dtypes = tuple(dict.fromkeys(slot.dtype for slot in used))
        self._max_rank = _tiled(max((slot.layout.ranks[-1] for slot in used), default=0))
        self.write()
        rows = torch.tensor([-1 if slot is None else slot.index for slot in self.slots])
        self._plan = ops.plan(rows).to(device)

    def write(self) -> None:
        """Brings the table up to date, should a slot have moved since the last batch."""
        for slot in dict.fromkeys(self.slots):
            if slot is not None:
                self._table.write(slot)
        self._tables = tuple((dtype, self._table.tensor(dtype)) for dtype in self._dtypes)

    def add(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share at a module. See `layers.Batch`."""
        y = y.contiguous()
        tokens = y.view(-1, y.shape[-1])
        column = self._columns[module.path]
        for dtype, table in self._tables:
            if module.embedding:
                h = ops.lookup(x.reshape(-1), table, self._plan, column, self._max_rank, dtype)
            else:
                flat = x.reshape(-1, x.shape[-1]).contiguous()
                h = ops.shrink(flat, table, self._plan, [column], self._max_rank, dtype)
            ops.expand_([tokens], h, table, self._plan, [column], dtype)
        return y


def _tiled(rank: int) -> int:
    """The width of the kernels' sums: few different ones, since each is compiled apart."""
    return max(ops.RANKS, 1 << (rank - 1).bit_length()) if rank else ops.RANKS
