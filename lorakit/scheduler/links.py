"""How a cluster reaches its replicas, whatever carries the messages. `ray_cluster.py` is one such carrier."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Protocol

from lorakit.engine.stats import EngineStats
from lorakit.scheduler.messages import Given, Hello, Known, News

Choose = Callable[[frozenset[str]], Awaitable[str | None]]
"""The ids of the replicas that serve → the one that is to be asked; None: none any more."""


class Link(Protocol):
    """One replica. It does nothing for a cluster that another one has superseded.

    A method raises SupersededError if one has; whatever else it raises, the replica did not answer.
    """

    async def know(self, adapters: Sequence[Known]) -> None:
        """Has it know adapters."""
        ...

    async def forget(self, names: Sequence[str]) -> None:
        """Has it forget adapters."""
        ...

    async def unpin(self, name: str) -> None:
        """Has an adapter make room for others again."""
        ...

    async def cancel(self, tickets: Collection[int]) -> None:
        """Takes sequences back; its news tell when they have ended."""
        ...

    async def beat(self) -> EngineStats:
        """Tells it that the cluster is there."""
        ...

    def news(self) -> AsyncIterator[News]:
        """What happens there, until it is let go or dies."""
        ...

    async def let_go(self) -> None:
        """It has nothing left to do, and may end."""
        ...

    def kill(self) -> None:
        """Ends it at once, whatever it does, unless another cluster leads."""
        ...


class Links(Protocol):
    """All replicas. What changes them is done only while this cluster leads."""

    async def lead(self) -> None:
        """Leads, before all else, and goes on to: to be said every now and then.

        Raises:
            EngineBusyError: another cluster leads.
            SupersededError: this one did, and another one does.
        """
        ...

    async def open(self, count: int) -> None:
        """Has replicas begin, so many in the end, or finds those that a cluster before this one has left."""
        ...

    async def ids(self, seen: Callable[[frozenset[str]], None]) -> None:
        """Tells which replicas serve now, and are not about to end."""
        ...

    async def meet(self, id: str) -> tuple[Link, Hello]:
        """A replica, which serves this cluster from now on.

        Raises:
            SupersededError: another cluster leads.
            EngineBusyError: its engine is starting anew; it can be met when it has.
        """
        ...

    async def give(self, given: Given, choose: Choose) -> bool:
        """Gives a sequence to a replica that is chosen when it is sent; tells whether it was sent."""
        ...

    async def scale(self, count: int) -> None:
        """Has so many replicas; if they are fewer than before, some stop being told by `ids`, and end when let go.

        Raises:
            SupersededError: another cluster leads.
        """
        ...

    async def close(self) -> None:
        """Ends all, unless another cluster leads."""
        ...
