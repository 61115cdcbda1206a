"""The pool: adapters in the memory of the device that serves them.

A slot is one extent in the bank's own layout, so a load is one copy. With a limit, the least recently used adapter
that no running batch holds makes room. Knows slots and bytes; knows no module and no request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from lorakit.adapters.form import ModuleForm
from lorakit.adapters.layout import Extent
from lorakit.errors import PoolFullError


@dataclass(frozen=True, eq=False)
class Slot:
    """An adapter's place in device memory.

    Attributes:
        modules: module path → its form, as views into the slot's extent.
        nbytes: the extent's size in bytes.
    """

    modules: Mapping[str, ModuleForm]
    nbytes: int


class AdapterPool:
    """Slots by key, least recently used first. A key stands for an adapter's content, not for its name."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype | None = None, capacity: int | None = None) -> None:
        """Makes an empty pool.

        Args:
            device: where the slots live.
            dtype: A's and B's dtype there; None keeps each adapter's own.
            capacity: bytes that all slots together may take; None for no limit.
        """
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        self._slots: OrderedDict[str, Slot] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes that the slots take."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def keys(self) -> list[str]:
        """Resident adapters, least recently used first."""
        return list(self._slots)

    def get(self, key: str) -> Slot | None:
        """The slot of an adapter, now the most recently used, or None if it is not resident."""
        if key in self._slots:
            self._slots.move_to_end(key)
        return self._slots.get(key)

    def put(self, key: str, extent: Extent, *, name: str, keep: Collection[str] = ()) -> Slot:
        """Copies an adapter's extent to the device, evicting idle adapters if there is a limit.

        Args:
            key: what the slot is found by; a slot of that key is replaced.
            extent: the adapter in host memory, its weights in any dtype: each region is cast and copied in one go.
            name: the adapter's name, for messages.
            keep: keys that must stay resident.

        Raises:
            PoolFullError: it does not fit beside what must stay.
        """
        dtype = self.dtype or extent.dtype
        nbytes = extent.layout.nbytes(dtype)
        self._slots.pop(key, None)
        self._make_room(nbytes, name, keep)
        weights = extent.weights.to(self.device, dtype, copy=True)
        slot = Slot(extent.layout.views(weights, extent.vectors.to(self.device, copy=True)), nbytes)
        self._slots[key] = slot
        return slot

    def keep_only(self, keys: Collection[str]) -> None:
        """Forgets every adapter but these."""
        for key in [key for key in self._slots if key not in keys]:
            del self._slots[key]

    def drop(self, key: str) -> None:
        """Forgets an adapter; its memory is free once no running batch holds the slot."""
        self._slots.pop(key, None)

    def _make_room(self, nbytes: int, name: str, keep: Collection[str]) -> None:
        if self.capacity is None:
            return
        kept = sum(slot.nbytes for key, slot in self._slots.items() if key in keep)
        if kept + nbytes > self.capacity:
            raise PoolFullError(
                f"adapter {name!r} needs {nbytes:,} bytes beside {kept:,} bytes that must stay, but the adapters' "
                f"memory is limited to {self.capacity:,}; raise adapter_memory, or use fewer adapters in one batch."
            )
        for key in [key for key in self._slots if key not in keep]:
            if self.nbytes + nbytes <= self.capacity:
                return
            del self._slots[key]
