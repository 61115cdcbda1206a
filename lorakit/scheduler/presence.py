"""Which replicas a cluster has: each is met when it comes, listened to, and let go.

What follows from that for sequences is the dispatcher's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from lorakit.engine.stats import EngineStats
from lorakit.errors import EngineError
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.links import Links
from lorakit.scheduler.live import LiveReplica
from lorakit.scheduler.loop import ENDS, Loop
from lorakit.scheduler.messages import Hello, News
from lorakit.scheduler.snapshot import Limits
from lorakit.scheduler.totals import Totals

_log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two looks at which replicas there are
_MEET_AGAIN = 2.0  # seconds after which a replica that could not be met is met again
_NO_LIMIT = Limits(batch=1, blocks=1, block_tokens=1)


class Told(NamedTuple):
    """Who is told what happens to replicas, in the loop.

    Attributes:
        came: one serves.
        ends: one is about to end; said again until it is forgotten.
        said: what one says.
        gone: one is gone, with the reason, and whether it is to be ended: if not, it may be met again.
    """

    came: Callable[[LiveReplica], object]
    ends: Callable[[LiveReplica], object]
    said: Callable[[LiveReplica, News], object]
    gone: Callable[[LiveReplica, str, bool], object]


class Presence:
    """The replicas. Of the cluster's loop, but for what says otherwise.

    Attributes:
        replicas: number → replica, those that end among them.
        limits: what the replica holds that came last. They may be unlike; the next one is taken to be like it.
        capacity: the most tokens that one sequence may have on any replica that has come; 0 before.
        totals: what all have counted.
    """

    def __init__(
        self, links: Links, catalog: Catalog, config: ClusterConfig, most: int, loop: Loop, told: Told
    ) -> None:
        """Knows no replica yet.

        Args:
            links: reach them.
            catalog: whose pinned adapters each replica is told of when it comes.
            config: the settings.
            most: replicas there may be.
            loop: the cluster's.
            told: who is told.
        """
        self.replicas: dict[int, LiveReplica] = {}
        self.limits = _NO_LIMIT
        self.capacity = 0
        self.totals = Totals()
        self._links = links
        self._catalog = catalog
        self._config = config
        self._most = most
        self._loop = loop
        self._told = told
        self._numbers: dict[str, int] = {}  # by the names that the links have for them
        self._meeting: set[str] = set()
        self._given_up: set[str] = set()
        self._over = False

    async def watch(self) -> None:
        """Looks which replicas there are, for ever."""
        while True:
            try:
                await asyncio.wait_for(self._links.ids(self._see), 10 * _LOOK)
            except ENDS:
                raise
            except Exception as error:  # noqa: BLE001 - there may be none for a while
                _log.debug("nobody tells which replicas there are: %s", error)
            await asyncio.sleep(_LOOK)

    def sync(self, ids: frozenset[str]) -> None:
        """Which replicas serve, as of now."""
        if self._over:
            return
        for name in ids - self._numbers.keys() - self._meeting - self._given_up:
            self._meeting.add(name)
            self._loop.spawn(self._meet(name))
        for name in self._numbers.keys() - ids:
            self._told.ends(self.replicas[self._numbers[name]])
        self._given_up &= ids

    def has(self, replica: LiveReplica) -> bool:
        """Whether it is one of them, and not another of its number."""
        return self.replicas.get(replica.id) is replica

    def forget(self, replica: LiveReplica) -> None:
        """A replica is none of them any more; it may be met again."""
        del self.replicas[replica.id]
        del self._numbers[replica.name]

    def end(self, replica: LiveReplica) -> None:
        """A replica that was forgotten is ended at once, and not met again."""
        self._given_up.add(replica.name)
        replica.link.kill()

    async def let_go(self, replica: LiveReplica) -> None:
        """A replica has nothing left to do, and may end."""
        with suppress(Exception):  # what it has done since the last beat
            self._note(replica, await asyncio.wait_for(replica.link.beat(), self._config.beat))
        with suppress(Exception):
            await replica.link.let_go()

    def close(self) -> None:
        """Meets nobody any more."""
        self._over = True

    def _see(self, ids: frozenset[str]) -> None:
        """Which replicas serve, as of now; in any thread."""
        self._loop.call(self.sync, ids)

    async def _meet(self, name: str) -> None:
        try:
            link, hello = await self._links.meet(name)
            pinned = [self._catalog.known(one) for one in self._catalog.pinned]
            if pinned:
                await link.know(pinned)
        except ENDS:
            raise
        except Exception as error:  # noqa: BLE001 - it may be on its way out
            _log.warning("replica %s cannot be reached: %s", name, error)
            await asyncio.sleep(_MEET_AGAIN)
            self._meeting.discard(name)
            return
        self._meeting.discard(name)
        self._settle(hello)
        replica = LiveReplica(self._free_number(), name, link, hello)
        replica.knows |= {one.name for one in pinned}
        self.replicas[replica.id] = replica
        self._numbers[name] = replica.id
        self._loop.spawn(self._listen(replica))
        self._loop.spawn(self._beat(replica))
        _log.info("replica %s serves", name)
        self._told.came(replica)

    def _settle(self, hello: Hello) -> None:
        self.limits, self.capacity = hello.limits, max(self.capacity, hello.capacity)

    def _free_number(self) -> int:
        """The highest below all others: ties go to the highest, so the youngest empty first, and go first."""
        if not self.replicas:
            return 2 * self._most
        lowest = min(self.replicas)
        return lowest - 1 if lowest else next(one for one in itertools.count() if one not in self.replicas)

    async def _listen(self, replica: LiveReplica) -> None:
        try:
            async for news in replica.link.news():
                replica.hear(news)
                if self.has(replica):
                    self._told.said(replica, news)
            reason, kill = "it has not heard of this server for too long", False
        except ENDS:
            raise
        except EngineError as error:  # it lives, and tells why it says no more
            reason, kill = str(error), False
        except Exception as error:  # noqa: BLE001 - a replica dies in many ways
            reason, kill = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", True
        if self.has(replica):
            self._told.gone(replica, reason, kill)

    async def _beat(self, replica: LiveReplica) -> None:
        while self.has(replica):
            with suppress(Exception):
                stats = await asyncio.wait_for(replica.link.beat(), self._config.silence)
                if self.has(replica):
                    self._note(replica, stats)
            await asyncio.sleep(self._config.beat)

    def _note(self, replica: LiveReplica, stats: EngineStats) -> None:
        """A replica has told its numbers."""
        self.totals.note(replica.stats, stats)
        replica.stats = stats
