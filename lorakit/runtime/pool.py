"""The pool: adapters in the memory of the device that serves them.

A slot is one extent in the bank's own layout, so a load is one copy. With a limit, the least recently used adapter
that no running batch holds makes room. Knows slots and bytes; knows no module and no request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from lorakit.adapters.form import ModuleForm
from lorakit.adapters.layout import Extent
from lorakit.errors import PoolFullError


@dataclass(frozen=True, eq=False)
class Slot:
    """An adapter's place in device memory.

    Attributes:
        name: the adapter's name.
        modules: module path → its form, as views into the slot's extent.
        nbytes: the extent's size in bytes.
    """

    name: str
    modules: Mapping[str, ModuleForm]
    nbytes: int


class AdapterPool:
    """Slots by name, least recently used first."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype | None = None, capacity: int | None = None) -> None:
        """Args:
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
    def names(self) -> list[str]:
        """Resident adapters, least recently used first."""
        return list(self._slots)

    def get(self, name: str) -> Slot | None:
        """The slot of an adapter, now the most recently used, or None if it is not resident."""
        if name in self._slots:
            self._slots.move_to_end(name)
        return self._slots.get(name)

    def put(self, name: str, extent: Extent, *, keep: Iterable[str] = ()) -> Slot:
        """Copies an adapter's extent to the device, evicting idle adapters if there is a limit.

        Args:
            name: the adapter's name; a slot of that name is replaced.
            extent: the adapter in host memory, its weights in any dtype: each region is cast and copied in one go.
            keep: names that must stay resident.

        Raises:
            PoolFullError: it does not fit beside what must stay.
        """
        dtype = self.dtype or extent.dtype
        nbytes = extent.layout.nbytes(dtype)
        self._make_room(name, nbytes, {name, *keep})
        weights = extent.weights.to(self.device, dtype, copy=True)
        slot = Slot(name, extent.layout.views(weights, extent.vectors.to(self.device, copy=True)), nbytes)
        self._slots[name] = slot
        self._slots.move_to_end(name)
        return slot

    def keep_only(self, names: Collection[str]) -> None:
        """Forgets every adapter but these."""
        for name in [name for name in self._slots if name not in names]:
            del self._slots[name]

    def drop(self, name: str) -> None:
        """Forgets an adapter; its memory is free once no running batch holds the slot."""
        self._slots.pop(name, None)

    def _make_room(self, name: str, nbytes: int, keep: set[str]) -> None:
        if self.capacity is None:
            return
        kept = sum(slot.nbytes for other, slot in self._slots.items() if other in keep and other != name)
        if kept + nbytes > self.capacity:
            raise PoolFullError(
                f"adapter {name!r} needs {nbytes:,} bytes beside {kept:,} bytes that must stay, but the adapters' "
                f"memory is limited to {self.capacity:,}; raise adapter_memory, or use fewer adapters in one batch."
            )
        self._slots.pop(name, None)
        for other in [other for other in self._slots if other not in keep]:
            if self.nbytes + nbytes <= self.capacity:
                return
            del self._slots[other]
