"""Copies into device memory, in such an order that nothing is read half-written or overwritten while it is read.

On CUDA all copies run on one stream of their own, beside the computation, and the host waits for none of them. Two
rules hold: a stream that reads waits for the copy that brought what it reads, and a copy waits for the readers of what
lay where it writes, and for no others. Elsewhere copies are done when they return. Knows memory, streams and readers;
knows no adapter and no slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lorakit.runtime.arena import Move

STAGING = 4 << 20
"""Bytes of the buffer by way of which an extent moves to a place that overlaps its own and lies near it."""


@dataclass(eq=False)
class Access:
    """Who writes and who reads one piece of device memory; empty where copies are done when they return.

    Attributes:
        arrival: the end of the last copy into it, or None once that is known to be past.
        readers: streams that may read it now, or launch kernels that will.
        ends: stream → the end of its last reads, for streams that read no more.
        known: streams that the memory's allocator knows of.
    """

    arrival: torch.cuda.Event | None = None
    readers: set[torch.cuda.Stream] = field(default_factory=set)
    ends: dict[torch.cuda.Stream, torch.cuda.Event] = field(default_factory=dict)
    known: set[torch.cuda.Stream] = field(default_factory=set)

    def arrived(self) -> bool:
        """Whether the last copy into it has ended."""
        if self.arrival is not None and self.arrival.query():
            self.arrival = None
        return self.arrival is None


class _Fence(NamedTuple):
    """Bytes [begin, end) of the arena, which may be overwritten after these events."""

    begin: int
    end: int
    events: list[torch.cuda.Event]


class Transfers:
    """The copies of one device. It has no lock: its owner's covers every call."""

    def __init__(self, device: torch.device) -> None:
        """Makes the stream, where the device has streams.

        Args:
            device: where the memory lies.
        """
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._fences: list[_Fence] = []

    def arena(self, nbytes: int) -> torch.Tensor:
        """Takes memory in which pieces come and go: (nbytes,) uint8. Its readers are told by `vacate`."""
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if self._stream is not None:
            memory.record_stream(self._stream)
            # What the allocator gives may have been freed by kernels that still run.
            self._fences.append(_Fence(0, nbytes, [torch.cuda.current_stream(self.device).record_event()]))
        return memory

    def piece(self, nbytes: int) -> torch.Tensor:
        """Takes memory of its own for one piece: (nbytes,) uint8. The allocator lets readers end before reusing it."""
        with self._copying():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def load(self, target: torch.Tensor, source: torch.Tensor, access: Access, offset: int | None = None) -> None:
        """Copies from host memory, by one copy.

        Args:
            target: (n,) uint8 on the device, a part of the arena or a piece.
            source: (n,) uint8 in host memory; pinned memory is copied without the host waiting.
            access: the target's, to learn of the copy.
            offset: the target's first byte in the arena; None for a piece.
        """
        if offset is not None:
            self._await_readers(offset, offset + target.numel())
        with self._copying():
            target.copy_(source, non_blocking=True)
        self._arrives([access])

    def move(self, arena: torch.Tensor, moves: Sequence[Move], accesses: Sequence[Access]) -> None:
        """Carries out `Arena.compaction`'s moves.

        Args:
            arena: the memory.
            moves: in the order planned.
            accesses: of each moved extent; they learn of its new place, and its old readers are waited for.
        """
        with self._copying():
            # Taken before anything is overwritten: without memory for it, nothing has happened yet.
            steps = [min(move.nbytes, STAGING) for move in moves if _is_near(move)]
            staging = torch.empty(max(steps, default=0), dtype=torch.uint8, device=self.device)
        for move, access in zip(moves, accesses, strict=True):
            self.vacate(move.source, move.source + move.nbytes, access)
            self._await_readers(move.target, move.target + move.nbytes)
            with self._copying():
                _slide(arena, move, staging)
        self._arrives(accesses)

    def vacate(self, begin: int, end: int, access: Access) -> None:
        """Frees bytes [begin, end) of the arena: the next copy there waits for those who read them until now."""
        if self._stream is None:
            return
        # Streams that have not told the end of their reads are taken to read until now.
        self.end_reads([access])
        events = [event for event in access.ends.values() if not event.query()]
        access.ends = {}
        if events:
            self._fences.append(_Fence(begin, end, events))

    def wait(self, memory: torch.Tensor, access: Access) -> None:
        """Makes the current stream wait for the copy into memory that it is about to read; the host goes on."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if not access.arrived() and access.arrival is not None:
            stream.wait_event(access.arrival)
        access.readers.add(stream)
        if stream not in access.known:
            memory.record_stream(stream)
            access.known.add(stream)

    def end_reads(self, accesses: Iterable[Access]) -> None:
        """Notes that the reads enqueued until now, on every stream that waited for a piece, are its last for now."""
        events: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        for access in accesses:
            for stream in access.readers:
                if stream not in events:
                    events[stream] = stream.record_event()
                access.ends[stream] = events[stream]
            access.readers = set()

    def _copying(self) -> Any:
        """A context in which the current stream is that of the copies."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _arrives(self, accesses: Iterable[Access]) -> None:
        if self._stream is not None:
            event = self._stream.record_event()
            for access in accesses:
                access.arrival = event

    def _await_readers(self, begin: int, end: int) -> None:
        """Makes the copies' stream wait for the readers of bytes [begin, end) of the arena."""
        if self._stream is None:
            return
        fences = []
        for fence in self._fences:
            if fence.begin < end and begin < fence.end:
                # Every later copy comes after this one, so the whole fence has done its work.
                for event in fence.events:
                    self._stream.wait_event(event)
            elif not all(event.query() for event in fence.events):
                fences.append(fence)
        self._fences = fences


def _is_near(move: Move) -> bool:
    """Whether steps that do not overlap themselves would be many and small."""
    return move.source - move.target < min(move.nbytes, STAGING)


def _slide(arena: torch.Tensor, move: Move, staging: torch.Tensor) -> None:
    """Copies an extent to its lower place, front to back, never overwriting what is still to be copied."""
    source, target, nbytes = move
    near = _is_near(move)
    step = STAGING if near else source - target
    for begin in range(0, nbytes, step):
        size = min(step, nbytes - begin)
        piece = arena[source + begin : source + begin + size]
        if near:
            piece = staging[:size].copy_(piece)
        arena[target + begin : target + begin + size].copy_(piece)
