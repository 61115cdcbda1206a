"""The replicas that may be given requests, found by working set and by adapter in a time that hardly grows with them.

Sets of replicas are Python integers, a bit a replica: the highest id of a set is its bit length, and an intersection is
one `&`, also for ten thousand replicas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from lorakit.scheduler.snapshot import Replica, ReplicaView


class Fleet:
    """An index over replicas that are neither starting nor draining."""

    def __init__(self, batch: int) -> None:
        """Has no replica yet.

        Args:
            batch: the most requests of a working set; a replica may come that takes more.
        """
        self.batch = batch
        self.everyone = 0
        self.sizes = [0] * (batch + 1)
        self._filled = 0
        self._replicas: dict[int, Replica] = {}
        self._size: dict[int, int] = {}
        self._holders: defaultdict[int, int] = defaultdict(int)
        self._below = (1 << batch) - 1

    @classmethod
    def of(cls, batch: int, replicas: Iterable[ReplicaView]) -> Fleet:
        """An index over replicas that are data."""
        fleet = cls(batch)
        for replica in replicas:
            fleet.add(replica)
            for adapter in replica.residents:
                fleet.hold(adapter, replica.id)
        return fleet

    def __len__(self) -> int:
        return len(self._replicas)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __getitem__(self, number: int) -> Replica:
        return self._replicas[number]

    def __contains__(self, number: int) -> bool:
        return number in self._replicas

    def add(self, replica: Replica) -> None:
        """A replica may be given requests from now on."""
        assert replica.id not in self._replicas and replica.id >= 0
        if replica.limits is not None and replica.limits.batch > self.batch:
            self._widen(replica.limits.batch)
        self._replicas[replica.id] = replica
        self.everyone |= 1 << replica.id
        self._size[replica.id] = -1
        self.resize(replica.id, replica.working_set)

    def _widen(self, batch: int) -> None:
        self.sizes += [0] * (batch - self.batch)
        self.batch = batch
        self._below = (1 << batch) - 1

    def remove(self, number: int) -> None:
        """A replica is given no requests any more."""
        bit = 1 << number
        self.everyone ^= bit
        size = self._size.pop(number)
        self.sizes[size] ^= bit
        if not self.sizes[size]:
            self._filled ^= 1 << size
        del self._replicas[number]
        for adapter in [adapter for adapter, holders in self._holders.items() if holders & bit]:
            self.drop(adapter, number)

    def resize(self, number: int, size: int) -> None:
        """A replica's working set has another size; one that is not in the index is left out."""
        old = self._size.get(number)
        if old is None or old == size:
            return
        bit = 1 << number
        sizes = self.sizes
        if old >= 0:
            sizes[old] ^= bit
            if not sizes[old]:
                self._filled ^= 1 << old
        if not sizes[size]:
            self._filled ^= 1 << size
        sizes[size] ^= bit
        self._size[number] = size

    def hold(self, adapter: int, number: int) -> None:
        """An adapter came to a replica's device memory."""
        self._holders[adapter] |= 1 << number

    def drop(self, adapter: int, number: int) -> None:
        """An adapter left a replica's device memory."""
        left = self._holders[adapter] & ~(1 << number)
        if left:
            self._holders[adapter] = left
        else:
            del self._holders[adapter]

    def holders(self, adapter: int) -> int:
        """The set of replicas that hold an adapter."""
        return self._holders.get(adapter, 0) & self.everyone

    def fullest_first(self) -> Iterator[tuple[int, int]]:
        """Size and set of the replicas, by size of the working set, the largest first; without those of a full batch.

        Where batches are unlike, the largest one counts.
        """
        filled = self._filled & self._below
        while filled:
            size = filled.bit_length() - 1
            yield size, self.sizes[size]
            filled ^= 1 << size

    def emptiest_first(self) -> Iterator[tuple[int, int]]:
        """The same, the smallest first."""
        filled = self._filled & self._below
        while filled:
            size = (filled & -filled).bit_length() - 1
            yield size, self.sizes[size]
            filled ^= 1 << size

    def up_to(self, size: int) -> int:
        """How many replicas have a working set of at most so many requests."""
        found = 0
        filled = self._filled & ((1 << (min(size, self.batch) + 1)) - 1) if size >= 0 else 0
        while filled:
            low = filled & -filled
            found += self.sizes[low.bit_length() - 1].bit_count()
            filled ^= low
        return found


def numbers(replicas: int) -> Iterator[int]:
    """The ids of a set, the highest first."""
    while replicas:
        number = replicas.bit_length() - 1
        yield number
        replicas ^= 1 << number
