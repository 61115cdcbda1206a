"""Requests that fit nowhere, and which of them is next.

A request that is evicted comes back with its original arrival, and so before all that came later. Pure Python.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from lorakit.engine.fairness import QUANTUM, FairQueue
from lorakit.scheduler.snapshot import Request


class Queued(Request, Protocol):
    """A request that can wait.

    Attributes:
        cost: what it may take, in tokens: its prompt and the most that it may generate.
        placed: whether a replica had it before it came to wait again.
    """

    @property
    def cost(self) -> int: ...  # noqa: D102
    @property
    def placed(self) -> bool: ...  # noqa: D102


R = TypeVar("R", bound=Queued)


class Queue(Protocol[R]):
    """What a scheduler needs of a queue.

    Attributes:
        passable: whether a request may pass another one that has no place.
    """

    passable: bool

    def __len__(self) -> int: ...

    def add(self, request: R) -> None:
        """A request waits."""
        ...

    def heads(self) -> Iterator[R]:
        """The requests that may be next, in order; those behind the first only if they may pass it."""
        ...

    def take(self, request: R) -> None:
        """One of the heads waits no more."""
        ...


class Fcfs(Generic[R]):
    """First come, first served: while the oldest fits nowhere, nobody passes it (Punica)."""

    passable = False

    def __init__(self) -> None:
        """Is empty."""
        self._heap: list[tuple[float, int, R]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: R) -> None:
        """A request waits, in the order of its arrival."""
        heapq.heappush(self._heap, (request.arrival, request.key, request))

    def heads(self) -> Iterator[R]:
        """The oldest."""
        if self._heap:
            yield self._heap[0][2]

    def take(self, request: R) -> None:
        """The oldest waits no more."""
        assert self._heap[0][2] is request
        heapq.heappop(self._heap)

    def remove(self, request: R) -> bool:
        """Takes a request out that nobody wants any more; False if it does not wait."""
        left = [entry for entry in self._heap if entry[2] is not request]
        found = len(left) < len(self._heap)
        if found:
            heapq.heapify(left)
            self._heap = left
        return found


class FairFcfs(Generic[R]):
    """Deficit round robin over tenants, which are the adapters' owners; first come, first served within each.

    The one whose turn it is is not passed either. A request that was evicted was charged before, and goes first.
    """

    passable = False

    def __init__(
        self,
        tenant: Callable[[R], Hashable],
        weight: Callable[[Hashable], float] = lambda _: 1.0,
        may_run: Callable[[Hashable], bool] = lambda _: True,
        quantum: int = QUANTUM,
    ) -> None:
        """Is empty.

        Args:
            tenant: whose a request is.
            weight: of a tenant.
            may_run: whether a tenant may have one more request running; others pass one that may not.
            quantum: tokens of a turn.
        """
        self._tenant = tenant
        self._weight = weight
        self._may_run = may_run
        self._turns = FairQueue(quantum)
        self._waiting: dict[int, R] = {}
        self._again: Fcfs[R] = Fcfs()
        self._next: R | None = None

    def __len__(self) -> int:
        return len(self._turns) + len(self._again) + (self._next is not None)

    def add(self, request: R) -> None:
        """A request waits for its tenant's turn."""
        if request.placed:
            self._again.add(request)
            return
        tenant = self._tenant(request)
        self._waiting[request.key] = request
        self._turns.add(request.key, tenant, request.cost, self._weight(tenant))

    def heads(self) -> Iterator[R]:
        """The one whose turn it is."""
        if len(self._again):
            yield from self._again.heads()
            return
        if self._next is None:
            key = self._turns.choose(lambda tenant, _: self._may_run(tenant))
            if isinstance(key, int):
                self._next = self._waiting.pop(key)
        if self._next is not None:
            yield self._next

    def take(self, request: R) -> None:
        """It waits no more."""
        if self._next is request:
            self._next = None
        else:
            self._again.take(request)

    def remove(self, request: R) -> bool:
        """Takes a request out that nobody wants any more, at no charge; False if it does not wait."""
        if self._next is request:
            self._next = None
            self.refund(request, request.cost)
            return True
        if self._waiting.pop(request.key, None) is not None:
            self._turns.remove(request.key)
            return True
        return self._again.remove(request)

    def refund(self, request: R, tokens: int) -> None:
        """Gives back to its tenant what a request was charged and did not take."""
        self._turns.refund(self._tenant(request), tokens)


class FcfsEach(Generic[R]):
    """First come, first served for each adapter: the others pass one that has no place. For a GPU a tenant."""

    passable = True

    def __init__(self) -> None:
        """Is empty."""
        self._queues: defaultdict[int, Fcfs[R]] = defaultdict(Fcfs)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: R) -> None:
        """A request waits behind those of its adapter."""
        self._queues[request.adapter].add(request)
        self._count += 1

    def heads(self) -> Iterator[R]:
        """The oldest of every adapter, the oldest of all first."""
        heads = [head for queue in self._queues.values() for head in queue.heads()]
        yield from sorted(heads, key=lambda one: (one.arrival, one.key))

    def take(self, request: R) -> None:
        """It waits no more."""
        queue = self._queues[request.adapter]
        queue.take(request)
        self._count -= 1
        if not len(queue):
            del self._queues[request.adapter]
