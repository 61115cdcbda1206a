"""Replicas in this process, which begin, end, die and hang as a test wants, in the place of Ray's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy
from tiny_engines import text

from lorakit import Engine, MultiLoraModel
from lorakit.engine.config import EngineConfig
from lorakit.engine.stats import EngineStats
from lorakit.errors import SupersededError
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.links import Choose
from lorakit.scheduler.messages import Given, Hello, Known, News
from lorakit.scheduler.seat import Seat
from lorakit.scheduler.shelf import Shelf
from lorakit.scheduler.worker import Worker


class Dead(Exception):
    """The replica does not answer any more."""


class InProcessReplica:
    """One replica. It may be killed, and it may hang."""

    def __init__(self, name: str, worker: Worker) -> None:
        self.name = name
        self.worker = worker
        self.killed = False
        self.hangs = False
        self.gone = False

    async def do(self, call: Callable[..., Any], *args: Any) -> Any:
        while self.hangs and not self.killed:
            await asyncio.sleep(0.01)
        if self.killed:
            raise Dead(self.name)
        return await asyncio.to_thread(call, *args)


class InProcessLink:
    """One replica, as the server of a term reaches it."""

    def __init__(self, replica: InProcessReplica, seat: Seat, term: int) -> None:
        self._replica = replica
        self._worker = replica.worker
        self._seat = seat
        self._term = term

    async def know(self, adapters: Sequence[Known]) -> None:
        await self._replica.do(self._worker.know, self._term, adapters)

    async def forget(self, names: Sequence[str]) -> None:
        await self._replica.do(self._worker.forget, self._term, names)

    async def unpin(self, name: str) -> None:
        await self._replica.do(self._worker.unpin, self._term, name)

    async def cancel(self, tickets: Collection[int]) -> None:
        await self._replica.do(self._worker.cancel, self._term, tickets)

    async def beat(self) -> EngineStats:
        await self._replica.do(self._worker.beat, self._term)
        return await self._replica.do(self._worker.stats)

    async def news(self) -> AsyncIterator[News]:
        async for news in self._worker.news(self._term):
            while self._replica.hangs and not self._replica.killed:
                await asyncio.sleep(0.01)
            if self._replica.killed:
                raise Dead(self._replica.name)
            yield news

    async def let_go(self) -> None:
        self._worker.check(self._term)
        self._replica.gone = True
        await asyncio.to_thread(self._worker.engine.close)

    def kill(self) -> None:
        with suppress(SupersededError):
            self._seat.check(self._term)
            self._replica.killed = True


class InProcess:
    """All replicas: engines of one tiny model each. Another server may take them over, by `beside`."""

    def __init__(
        self,
        model: Callable[[], MultiLoraModel],
        catalog: Catalog,
        config: EngineConfig,
        beside: InProcess | None = None,
        lease: float = 60.0,
    ) -> None:
        self._make = model
        self._shelf = Shelf(catalog.folders)
        self.config_of = lambda name: config
        self._lease = lease
        self._names = (f"replica-{number}" for number in itertools.count()) if beside is None else beside._names
        self._seat = Seat(lease) if beside is None else beside._seat
        self._term: int | None = None
        self.links: dict[str, InProcessReplica] = {} if beside is None else beside.links
        self.ended: list[InProcessReplica] = [] if beside is None else beside.ended
        self.counts: list[int] = [] if beside is None else beside.counts
        self.away = False
        self.broken: Callable[[str, str], bool] = lambda replica, key: False
        self.first_to_go = ""
        self.room = 100  # replicas that there are machines for
        self.lost_scales: list[Callable[[], Awaitable[None]]] = []
        self._scaling = asyncio.Lock()

    @property
    def _leading(self) -> int:
        assert self._term is not None
        return self._term

    @property
    def serving(self) -> list[InProcessReplica]:
        return [link for link in self.links.values() if not link.killed]

    def fetch(self, replica: str, key: str) -> numpy.ndarray:
        """An adapter's bytes, as the object store would have them."""
        if self.broken(replica, key):
            raise OSError("the disk is broken")
        return self._shelf.read(key)

    async def lead(self) -> None:
        if self._term is None:
            self._term = self._seat.take()
        elif not self.away:
            self._seat.check(self._term)

    async def open(self, count: int) -> None:
        await self.scale(count)

    async def scale(self, count: int) -> None:
        self._seat.check(self._leading)
        if self.lost_scales:
            await self.lost_scales.pop()()
        self.counts.append(count)
        await asyncio.shield(asyncio.ensure_future(self._scale()))  # what was begun is not left half done

    async def _scale(self) -> None:
        async with self._scaling:
            await self._have_as_many()

    async def _have_as_many(self) -> None:
        while len(self.serving) > self.counts[-1]:  # the newest goes first, as with Ray Serve
            name = self.first_to_go if self.first_to_go in self.links else self.serving[-1].name
            self.ended.append(self.links.pop(name))
        while len(self.serving) < min(self.counts[-1], self.room):
            name = next(self._names)
            engine = await asyncio.to_thread(self._engine_of, name)
            worker = Worker(engine, partial(self.fetch, name), lease=self._lease)
            self.links[name] = InProcessReplica(name, worker)

    def _engine_of(self, name: str) -> Engine:
        return Engine(self._make(), self.config_of(name), decode=text).start()

    async def ids(self, seen: Callable[[frozenset[str]], None]) -> None:
        # One that died is replaced, as by Ray Serve.
        for name in [name for name, link in self.links.items() if link.killed]:
            self.ended.append(self.links.pop(name))
        if not self._scaling.locked():
            await self._scale()
        seen(frozenset(self.links))

    async def meet(self, id: str) -> tuple[InProcessLink, Hello]:
        replica = self.links[id]
        hello = await replica.do(replica.worker.hello, self._leading)
        return InProcessLink(replica, self._seat, self._leading), hello

    async def give(self, given: Given, choose: Choose) -> bool:
        chosen = await choose(frozenset(self.links))
        if chosen is None:
            return False
        replica = self.links[chosen]
        await replica.do(replica.worker.take, self._leading, given)
        return True

    async def close(self) -> None:
        if self._term is None:
            return
        self._seat.leave(self._term)
        for replica in (*self.links.values(), *self.ended):
            replica.killed = True
            await asyncio.to_thread(replica.worker.engine.close)
