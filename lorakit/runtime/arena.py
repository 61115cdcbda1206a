"""The arena: which bytes of one contiguous range are taken.

Extents lie aligned; a request takes the smallest hole that holds it, and neighbouring holes are one. Where the free
bytes suffice but no hole does, a plan of moves makes one. Knows offsets and sizes; knows no memory, no tensor and no
adapter: whoever owns the bytes carries out the moves.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

ALIGNMENT = 256
"""Bytes: every extent begins at a multiple and takes a multiple. What CUDA's own allocations are aligned to, so that
kernels may assume of a slot what they may of a tensor."""


def aligned(nbytes: int) -> int:
    """The bytes that an extent of this size takes; an empty one takes some too, so that its offset is its own."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


class Move(NamedTuple):
    """One extent's way to a lower place, which its old place may overlap.

    Attributes:
        source: the byte at which it begins.
        target: the byte at which it is to begin.
        nbytes: its taken bytes.
    """

    source: int
    target: int
    nbytes: int


class Arena:
    """Extents in the range [0, capacity).

    Finding a hole takes a binary search, and releasing an extent finds its neighbours by their ends.

    Attributes:
        capacity: the range's bytes, a multiple of `ALIGNMENT`.
        free: the bytes of all holes.
    """

    def __init__(self, capacity: int) -> None:
        """Makes an empty range.

        Args:
            capacity: its bytes; a part of `ALIGNMENT` at its end counts as a whole one.
        """
        self.capacity = aligned(capacity) if capacity > 0 else 0
        self.free = 0
        self._extents: dict[int, int] = {}
        self._set_holes()

    @property
    def extents(self) -> dict[int, int]:
        """Offset → bytes of every extent, by offset."""
        return dict(sorted(self._extents.items()))

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest request that `allocate` would meet."""
        return self._by_size[-1][0] if self._by_size else 0

    def copy(self) -> Arena:
        """The same extents and holes, to try things on."""
        other = Arena.__new__(Arena)
        other.capacity, other.free, other._extents = self.capacity, self.free, self._extents.copy()
        other._holes, other._ends, other._by_size = self._holes.copy(), self._ends.copy(), self._by_size.copy()
        return other

    def allocate(self, nbytes: int) -> int | None:
        """Takes the smallest hole that holds a request, the lowest of equal ones.

        Args:
            nbytes: at least so many bytes.

        Returns:
            The extent's first byte, or None if no hole holds it.
        """
        nbytes = aligned(nbytes)
        place = bisect_left(self._by_size, (nbytes, 0))
        if place == len(self._by_size):
            return None
        size, offset = self._by_size[place]
        self._remove_hole(offset)
        if size > nbytes:
            self._add_hole(offset + nbytes, size - nbytes)
        self._extents[offset] = nbytes
        return offset

    def release(self, offset: int) -> None:
        """Gives back the extent that begins at this byte."""
        nbytes = self._extents.pop(offset)
        end = offset + nbytes
        below = self._ends.get(offset)
        if below is not None:
            self._remove_hole(below)
            offset = below
        if end in self._holes:
            end += self._remove_hole(end)
        self._add_hole(offset, end - offset)

    def compaction(self, nbytes: int, fixed: Collection[int] = ()) -> list[Move] | None:
        """Plans a hole for a request by sliding neighbouring extents down, as few bytes as possible.

        Carried out in their order, moves never overwrite bytes that are still to be moved, except that an extent's
        new place may overlap its own old one. Without fixed extents there is a plan whenever `free` suffices.

        Args:
            nbytes: the request.
            fixed: offsets of extents that cannot move.

        Returns:
            The moves, none if a hole is there already; None if no such hole can be made. `move` books them.
        """
        nbytes = aligned(nbytes)
        if self.largest_hole >= nbytes:
            return []
        best: tuple[int, list[tuple[int, int]]] | None = None
        for begin, end, run in self._runs(fixed):
            # Of every window of neighbours that ends before `limit`, the shortest with enough bytes of holes.
            ends = [begin, *(offset + size for offset, size in run)]
            starts = [*(offset for offset, _ in run), end]
            first = moved = gaps = 0
            for last, limit in enumerate(starts):
                gaps += limit - ends[last]
                while gaps - (starts[first] - ends[first]) >= nbytes:
                    gaps -= starts[first] - ends[first]
                    moved -= run[first][1]
                    first += 1
                if gaps >= nbytes and (best is None or moved < best[0]):
                    best = moved, run[first:last]
                if last < len(run):
                    moved += run[last][1]
        if best is None:
            return None
        moves = []
        target = self._ends[best[1][0][0]]  # the shortest window begins with a hole, so every extent in it moves
        for offset, size in best[1]:
            moves.append(Move(offset, target, size))
            target += size
        return moves

    def move(self, moves: Sequence[Move]) -> None:
        """Books moves that were planned on these very extents."""
        for source, target, nbytes in moves:
            assert self._extents.pop(source) == nbytes and target not in self._extents
            self._extents[target] = nbytes
        self._set_holes()

    def _runs(self, fixed: Collection[int]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """The ranges between fixed extents as (begin, end, movable extents inside by offset)."""
        begin = 0
        run: list[tuple[int, int]] = []
        for offset, size in sorted(self._extents.items()):
            if offset in fixed:
                yield begin, offset, run
                begin, run = offset + size, []
            else:
                run.append((offset, size))
        yield begin, self.capacity, run

    def _set_holes(self) -> None:
        """Finds the holes anew from the extents."""
        self.free = 0
        self._holes: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        place = 0
        for offset, size in [*sorted(self._extents.items()), (self.capacity, 0)]:
            if offset > place:
                self._add_hole(place, offset - place)
            place = offset + size

    def _add_hole(self, offset: int, size: int) -> None:
        self._holes[offset] = size
        self._ends[offset + size] = offset
        insort(self._by_size, (size, offset))
        self.free += size

    def _remove_hole(self, offset: int) -> int:
        size = self._holes.pop(offset)
        del self._ends[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        self.free -= size
        return size
