"""The pool: adapters in the memory of the device that serves them.

A slot is one extent in the bank's own layout, so a load is one copy. With a limit, slots lie in one arena, and the
least recently used adapter that no running batch holds makes room; where the room is in pieces, slots are moved
together. Knows slots and bytes; how copies are ordered is `transfers.py`'s, what lies where in the arena `arena.py`'s.
Knows no module and no request.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lorakit.adapters.form import ModuleForm
from lorakit.adapters.layout import Extent, Layout
from lorakit.errors import PoolFullError
from lorakit.runtime.arena import Arena, Move, aligned
from lorakit.runtime.host_cache import PINNED_LIMIT, ExtentReader, HostCache, HostExtent
from lorakit.runtime.transfers import Access, Transfers

_VECTORS_ALIGNMENT = 16
"""Bytes: what a thread loads at once."""


class Slot:
    """An adapter's place in device memory, which may change while no batch holds the slot.

    Tables of addresses are right for the generation for which they were made, and only for a slot that is held.

    Attributes:
        key: what the adapter is found by.
        index: a small number that no other slot has at the same time; the lowest that was free.
        layout: where the tensors lie in the slot.
        dtype: of A and B.
        nbytes: the extent's size in bytes.
        generation: no two slots of a pool ever have the same, and a slot that is moved gets a new one.
        pinned: whether the slot must not be evicted.
        holds: how many batches hold the slot.
        serial: counts the pool's slots; those of pools that do the same are counted alike.
    """

    def __init__(self, key: str, index: int, host: HostExtent, serial: int = 0) -> None:
        self.key = key
        self.index = index
        self.serial = serial
        self.layout: Layout = host.layout
        self.dtype: torch.dtype = host.dtype
        self.nbytes = host.layout.nbytes(host.dtype)
        self.generation = 0
        self.pinned = False
        self.holds = 0
        self._offset: int | None = None
        self._memory: torch.Tensor | None = None
        self._modules: Mapping[str, ModuleForm] | None = None
        self._access = Access()
        vectors = host.layout.weights_elements * host.dtype.itemsize
        assert vectors % _VECTORS_ALIGNMENT == 0, f"the vectors begin at byte {vectors}, between two loads"

    @property
    def resident(self) -> bool:
        """Whether the slot still has its memory; a slot that was evicted never gets any again."""
        return self._memory is not None

    @property
    def memory(self) -> torch.Tensor:
        """(nbytes,) uint8: the slot's bytes, the weights region and then the vectors region."""
        assert self._memory is not None, f"the slot of {self.key!r} was evicted or dropped"
        return self._memory

    @property
    def address(self) -> int:
        """The device address of the slot's first byte, a multiple of 256 on CUDA."""
        return self.memory.data_ptr()

    @property
    def modules(self) -> Mapping[str, ModuleForm]:
        """Module path → its form, as views into the slot's present place. `AdapterPool.wait` before reading them."""
        if self._modules is None:
            self._modules = Extent.of_bytes(self.layout, self.dtype, self.memory).modules()
        return self._modules

    def _place(self, memory: torch.Tensor | None, offset: int | None, generation: int) -> None:
        """Changes where the slot lies; its views are made anew when next asked for."""
        self._memory, self._offset, self.generation, self._modules = memory, offset, generation, None

    def ready(self) -> bool:
        """Whether the adapter has arrived, so that `AdapterPool.wait` would not make a stream wait."""
        return self._access.arrived()


class Operation(NamedTuple):
    """What was done with a pool, so that another does the same and lays out its memory alike.

    Attributes:
        kind: the pool's method: "put", "get", "drop", "acquire", "release", "pin" or "unpin".
        key: of the adapter.
        name: of the adapter, where it was put.
        serial: the slot's, where one was acquired or released.
        pinned: whether it was put to stay.
    """

    kind: str
    key: str
    name: str = ""
    serial: int = 0
    pinned: bool = False


class _Plan(NamedTuple):
    """What must happen before a hole is there: first these slots go, then these extents move."""

    victims: Sequence[Slot]
    moves: Sequence[Move]


class AdapterPool:
    """Slots by key, least recently used first. A key stands for an adapter's content, not for its name.

    It has no lock: its owner's covers every call. What runs between `acquire` and `release` needs none.

    Attributes:
        device: where the slots live.
        dtype: A's and B's dtype there, or None for each adapter's own.
        capacity: bytes that all slots together may take, or None.
        host: adapters in host memory, from where slots are loaded.
        generation: grows with every slot that is loaded, moved or forgotten; while it stays, all addresses stay.
        loads: how often an adapter was brought to the device.
        loaded_bytes: what that copied there.
        evictions: how often an adapter made room for another.
        journal: what was done since somebody looked; None where nobody wants to know.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
        host_capacity: int | None = None,
    ) -> None:
        """Makes an empty pool. It takes no device memory before its first adapter.

        Args:
            device: where the slots live.
            dtype: A's and B's dtype there; None keeps each adapter's own.
            capacity: bytes that all slots together may take, each counted up to a multiple of 256; they are taken at
                once with the first adapter. None: no limit, and memory of its own for each slot.
            host_capacity: bytes of host memory in which adapters are kept for their next load. None: 4 GiB of pinned
                memory for a CUDA device, and nothing elsewhere, where it would be the same memory twice.
        """
        self.device = device
        self.dtype = dtype
        self.capacity = capacity
        pinned = device.type == "cuda"
        if host_capacity is None:
            host_capacity = PINNED_LIMIT if pinned else 0
        self.host = HostCache(limit=host_capacity, pinned=pinned)
        self.generation = 0
        self.loads = self.loaded_bytes = self.evictions = 0
        self.journal: list[Operation] | None = None
        self._puts = itertools.count()
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._leaving: set[Slot] = set()
        self._nbytes = 0
        self._free_indices: list[int] = []
        self._transfers = Transfers(device)
        self._arena = None if capacity is None else Arena(capacity)
        self._memory: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the slots take, those of dropped adapters that a batch still holds included."""
        return self._nbytes

    @property
    def keys(self) -> list[str]:
        """Resident adapters, least recently used first."""
        return list(self._slots)

    @property
    def held(self) -> bool:
        """Whether a batch holds any slot."""
        return any(slot.holds for slot in (*self._slots.values(), *self._leaving))

    def __contains__(self, key: str) -> bool:
        """Whether an adapter is resident; unlike `get`, this uses it not."""
        return key in self._slots

    def get(self, key: str) -> Slot | None:
        """The slot of an adapter, now the most recently used, or None if it is not resident."""
        if key in self._slots:
            if self.journal is not None and next(reversed(self._slots)) != key:
                self.journal.append(Operation("get", key))
            self._slots.move_to_end(key)
        return self._slots.get(key)

    def put(
        self,
        key: str,
        source: Extent | ExtentReader | HostExtent,
        *,
        name: str,
        keep: Collection[str] = (),
        pinned: bool = False,
    ) -> Slot:
        """Brings an adapter to the device by one copy, evicting idle adapters if there is a limit.

        On CUDA the copy runs beside the computation: `wait` before reading the slot. Where the free bytes are in
        pieces, slots that no batch holds are moved together.

        Args:
            key: what the slot is found by; a slot of that key has this content already and is given as it is.
            source: the adapter, its weights in any dtype; not looked at if host memory has the adapter still. One that
                `HostCache.read` gave has the pool's dtype.
            name: the adapter's name, for messages.
            keep: keys that must stay resident; their slots may move.
            pinned: keep it from being evicted, as `pin` does.

        Returns:
            The slot, the most recently used.

        Raises:
            PoolFullError: it does not fit beside what must stay, or the device has no room for `capacity`.
            torch.OutOfMemoryError: without a limit, the device is full.
            BankCorruptedError, …: as `source` raises them. Of these errors each leaves resident what was; should a copy
                on the device itself fail, what was evicted for it is gone, and no half-made slot is left.
        """
        slot = self.get(key)
        if slot is not None:
            return slot
        with plain_tensors():
            nbytes = source.layout.nbytes(self.dtype or source.dtype)
            plan = self._plan(nbytes, name, keep)  # refuses before anything is read
            host = self._host(key, source)
            memory, offset = self._take(plan, nbytes, name)
            slot = Slot(key, self._take_index(), host, next(self._puts))
            self._nbytes += nbytes
            self.generation += 1
            slot._place(memory, offset, self.generation)
            try:
                self._transfers.load(memory, host.buffer, slot._access, offset)
            except BaseException:
                self._free(slot)
                raise
        arrival = slot._access.arrival
        host.copied = None if arrival is None else arrival.query
        slot.pinned = pinned
        self._slots[key] = slot
        self.loads += 1
        self.loaded_bytes += nbytes
        if self.journal is not None:
            assert not keep, "another pool would not know of them"
            self.journal.append(Operation("put", key, name, pinned=pinned))
        return slot

    def prefetch(self, key: str, source: Extent | ExtentReader) -> None:
        """Brings an adapter into host memory ahead of its `put`, if host memory has room for it.

        Raises:
            BankCorruptedError, …: as `source` raises them.
        """
        if key not in self._slots and self.host.limit:
            with plain_tensors():
                self._host(key, source)

    def acquire(self, slots: Iterable[Slot]) -> None:
        """Holds slots: until as many calls of `release` they are neither evicted nor moved.

        A slot that is dropped meanwhile keeps its memory and its index until then.
        """
        slots = list(slots)
        assert all(slot.resident for slot in slots), "a slot that was forgotten cannot be held"
        for slot in slots:
            slot.holds += 1
            self._note("acquire", slot)

    def release(self, slots: Iterable[Slot]) -> None:
        """Ends a hold. Kernels that read the slots may still run, on streams that waited for them."""
        idle = []
        for slot in slots:
            assert slot.holds > 0, "release comes after acquire"
            slot.holds -= 1
            self._note("release", slot)
            if not slot.holds:
                idle.append(slot)
        self._transfers.end_reads(slot._access for slot in idle)
        for slot in self._leaving.intersection(idle):
            self._leaving.remove(slot)
            self._free(slot)

    @contextmanager
    def hold(self, slots: Iterable[Slot]) -> Iterator[None]:
        """Holds slots for what runs inside, and makes the current stream wait for those that are still loading."""
        held = list(dict.fromkeys(slots))
        self.acquire(held)
        try:
            self.wait(held)
            yield
        finally:
            self.release(held)

    def wait(self, slots: Iterable[Slot]) -> None:
        """Makes the device's current stream wait until these slots are loaded; the host goes on.

        The stream is taken to read them until the next `release`; without one, until a slot is moved or evicted. Not
        to be called while a CUDA graph is captured.
        """
        for slot in slots:
            self._transfers.wait(slot.memory, slot._access)

    def pin(self, key: str) -> None:
        """Keeps a resident adapter from being evicted until `unpin`; its slot may move. `drop` ends it too."""
        assert key in self._slots, f"{key!r} is not resident"
        self._slots[key].pinned = True
        self._note("pin", self._slots[key])

    def unpin(self, key: str) -> None:
        """Lets an adapter be evicted again; nothing happens if it is not pinned or not resident."""
        if key in self._slots:
            self._slots[key].pinned = False
            self._note("unpin", self._slots[key])

    def keep_only(self, keys: Collection[str]) -> None:
        """Forgets every adapter but these, on the device and in host memory, as `drop` does."""
        for key in [key for key in self._slots if key not in keys]:
            self.drop(key)
        self.host.keep_only(keys)

    def drop(self, key: str) -> None:
        """Forgets an adapter, pinned or not; its memory is free once no running batch holds the slot."""
        self.host.drop(key)
        slot = self._slots.pop(key, None)
        if slot is None:
            return
        self._note("drop", slot)
        self.generation += 1
        if slot.holds:
            self._leaving.add(slot)
        else:
            self._free(slot)

    def begin_anew(self) -> None:
        """Forgets all adapters, so that pools from which the same is asked from now on are alike. None may be held."""
        assert not self.held
        self.keep_only(())
        self._free_indices = []
        self._puts = itertools.count()

    def replay(self, operation: Operation, read: Callable[[Operation], HostExtent]) -> Slot | None:
        """Does what was done with another pool that was like this one.

        Args:
            operation: the next in the order of its journal.
            read: gives the adapter that is put.

        Returns:
            The slot that was acquired, if one was: `wait` for it.

        Raises:
            BankCorruptedError, …: as `read` and `put` raise them.
        """
        if operation.kind == "put":
            self.put(operation.key, read(operation), name=operation.name, pinned=operation.pinned)
        elif operation.kind == "get":
            self.get(operation.key)
        elif operation.kind in ("drop", "pin", "unpin"):
            getattr(self, operation.kind)(operation.key)
        elif operation.kind == "release":
            self.release([self.slot_of(operation.serial)])
        else:
            slot = self.slot_of(operation.serial)
            self.acquire([slot])
            return slot
        return None

    def release_all(self) -> None:
        """Ends every hold."""
        for slot in (*self._slots.values(), *self._leaving):
            for _ in range(slot.holds):
                self.release([slot])

    def slot_of(self, serial: int) -> Slot:
        """The slot of a serial number."""
        return next(slot for slot in (*self._slots.values(), *self._leaving) if slot.serial == serial)

    def _note(self, kind: str, slot: Slot) -> None:
        if self.journal is not None:
            self.journal.append(Operation(kind, slot.key, serial=slot.serial))

    def _host(self, key: str, source: Extent | ExtentReader | HostExtent) -> HostExtent:
        found = self.host.get(key)
        if found is not None:
            return found
        if isinstance(source, HostExtent):
            self.host.keep(key, source)
            return source
        return self.host.put(key, source, self.dtype)

    def _plan(self, nbytes: int, name: str, keep: Collection[str]) -> _Plan:
        """Finds out, on a copy of the arena, what makes a hole; nothing is done yet."""
        if self._arena is None or self.capacity is None:
            return _Plan((), ())
        arena = self._arena.copy()
        idle = (slot for slot in self._slots.values() if not (slot.holds or slot.pinned or slot.key in keep))
        victims: list[Slot] = []
        # The arena may be larger than the limit by what aligns its end.
        spare = self.capacity - self._nbytes
        while True:
            if spare >= nbytes and arena.free >= aligned(nbytes):
                moves = [] if arena.largest_hole >= aligned(nbytes) else arena.compaction(nbytes, self._fixed())
                if moves is not None:
                    return _Plan(victims, moves)
            victim = next(idle, None)
            if victim is None:
                break
            assert victim._offset is not None
            arena.release(victim._offset)
            spare += victim.nbytes
            victims.append(victim)
        kept = arena.capacity - arena.free
        if spare < nbytes or arena.free < aligned(nbytes):
            raise PoolFullError(
                f"adapter {name!r} needs {aligned(nbytes):,} bytes beside {kept:,} bytes that must stay, but the "
                f"adapters' memory is limited to {self.capacity:,}; raise adapter_memory, or use fewer adapters in one "
                "batch."
            )
        raise PoolFullError(
            f"adapter {name!r} needs {aligned(nbytes):,} bytes in one piece, but beside {kept:,} bytes that must stay "
            f"the {arena.free:,} others of {self.capacity:,} are in pieces of at most {arena.largest_hole:,}, between "
            "adapters that running batches hold; raise adapter_memory, or wait until a batch has ended."
        )

    def _fixed(self) -> set[int]:
        """Where in the arena slots lie that must not move."""
        slots = (slot for slot in (*self._slots.values(), *self._leaving) if slot.holds)
        return {slot._offset for slot in slots if slot._offset is not None}

    def _take(self, plan: _Plan, nbytes: int, name: str) -> tuple[torch.Tensor, int | None]:
        """Carries out a plan and takes the hole: its memory, and its offset in the arena."""
        if self._arena is None:
            return self._transfers.piece(nbytes), None
        if self._memory is None:
            self._memory = self._take_arena(self._arena.capacity, name)
        for victim in plan.victims:
            del self._slots[victim.key]
            self._free(victim)
            self.evictions += 1
        if plan.moves:
            self._move(self._arena, self._memory, plan.moves)
        offset = self._arena.allocate(nbytes)
        assert offset is not None, "the plan makes a hole"
        return self._memory[offset : offset + nbytes], offset

    def _take_arena(self, nbytes: int, name: str) -> torch.Tensor:
        try:
            return self._transfers.arena(nbytes)
        except RuntimeError as error:  # what torch raises, on any device, where memory is short
            raise PoolFullError(
                f"adapter {name!r} cannot be loaded: {self.device} has no {nbytes:,} bytes to set aside for adapters "
                f"({error}); lower adapter_memory, or free memory there."
            ) from error

    def _move(self, arena: Arena, memory: torch.Tensor, moves: Sequence[Move]) -> None:
        slots = {slot._offset: slot for slot in self._slots.values()}
        moved = [slots[move.source] for move in moves]
        self._transfers.move(memory, moves, [slot._access for slot in moved])
        arena.move(moves)
        for slot, move in zip(moved, moves, strict=True):
            assert not slot.holds
            self.generation += 1
            slot._place(memory[move.target : move.target + slot.nbytes], move.target, self.generation)

    def _free(self, slot: Slot) -> None:
        """Gives back the memory and the index of a slot that is no longer among the slots."""
        if self._arena is not None and slot._offset is not None:
            self._transfers.vacate(slot._offset, slot._offset + aligned(slot.nbytes), slot._access)
            self._arena.release(slot._offset)
        self._nbytes -= slot.nbytes
        self.generation += 1
        slot._place(None, None, self.generation)
        heapq.heappush(self._free_indices, slot.index)

    def _take_index(self) -> int:
        """Takes the lowest free index."""
        # Without a free one below, as many as are taken are all taken.
        return heapq.heappop(self._free_indices) if self._free_indices else len(self._slots) + len(self._leaving)


@contextmanager
def plain_tensors() -> Iterator[Any]:
    """Makes tensors that later calls may write to, whatever modes the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield
