"""Replicas in this process, which begin, end, die and hang as a test wants, in the place of Ray's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy
from tiny_engines import text

from lorakit import Engine, MultiLoraModel
from lorakit.engine.config import EngineConfig
from lorakit.engine.stats import EngineStats
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.links import Choose
from lorakit.scheduler.messages import Given, Hello, Known, News
from lorakit.scheduler.shelf import Shelf
from lorakit.scheduler.worker import Worker


class Dead(Exception):
    """The replica does not answer any more."""


class InProcessLink:
    """One replica. It may be killed, and it may hang."""

    def __init__(self, name: str, worker: Worker) -> None:
        self.name = name
        self.worker = worker
        self.killed = False
        self.hangs = False
        self.gone = False

    async def _here(self, call: Callable[..., Any], *args: Any) -> Any:
        while self.hangs and not self.killed:
            await asyncio.sleep(0.01)
        if self.killed:
            raise Dead(self.name)
        return await asyncio.to_thread(call, *args)

    async def know(self, adapters: Sequence[Known]) -> None:
        await self._here(self.worker.know, adapters)

    async def forget(self, names: Sequence[str]) -> None:
        await self._here(self.worker.forget, names)

    async def unpin(self, name: str) -> None:
        await self._here(self.worker.unpin, name)

    async def cancel(self, tickets: Collection[int]) -> None:
        await self._here(self.worker.cancel, tickets)

    async def beat(self) -> EngineStats:
        await self._here(self.worker.beat, "test")
        return await self._here(self.worker.stats)

    async def news(self) -> AsyncIterator[News]:
        async for news in self.worker.news("test"):
            while self.hangs and not self.killed:
                await asyncio.sleep(0.01)
            if self.killed:
                raise Dead(self.name)
            yield news

    async def let_go(self) -> None:
        self.gone = True
        await asyncio.to_thread(self.worker.engine.close)

    def kill(self) -> None:
        self.killed = True


class InProcess:
    """All replicas: engines of one tiny model each."""

    def __init__(self, model: Callable[[], MultiLoraModel], catalog: Catalog, config: EngineConfig) -> None:
        self._make = model
        self._shelf = Shelf(catalog.folders)
        self._config = config
        self._names = (f"replica-{number}" for number in itertools.count())
        self.links: dict[str, InProcessLink] = {}
        self.ended: list[InProcessLink] = []
        self.counts: list[int] = []
        self.broken: Callable[[str, str], bool] = lambda replica, key: False
        self.first_to_go = ""
        self._scaling = asyncio.Lock()

    @property
    def serving(self) -> list[InProcessLink]:
        return [link for link in self.links.values() if not link.killed]

    def fetch(self, replica: str, key: str) -> numpy.ndarray:
        """An adapter's bytes, as the object store would have them."""
        if self.broken(replica, key):
            raise OSError("the disk is broken")
        return self._shelf.read(key)

    async def open(self, count: int) -> None:
        await self.scale(count)

    async def scale(self, count: int) -> None:
        self.counts.append(count)
        async with self._scaling:
            await self._have_as_many()

    async def _have_as_many(self) -> None:
        while len(self.serving) > self.counts[-1]:  # the newest goes first, as with Ray Serve
            name = self.first_to_go if self.first_to_go in self.links else self.serving[-1].name
            self.ended.append(self.links.pop(name))
        while len(self.serving) < self.counts[-1]:
            name = next(self._names)
            engine = await asyncio.to_thread(lambda: Engine(self._make(), self._config, decode=text).start())
            self.links[name] = InProcessLink(name, Worker(engine, partial(self.fetch, name), lease=60.0))

    async def ids(self, seen: Callable[[frozenset[str]], None]) -> None:
        # One that died is replaced, as by Ray Serve.
        for name in [name for name, link in self.links.items() if link.killed]:
            self.ended.append(self.links.pop(name))
        if not self._scaling.locked():
            async with self._scaling:
                await self._have_as_many()
        seen(frozenset(self.links))

    async def meet(self, id: str) -> tuple[InProcessLink, Hello]:
        link = self.links[id]
        return link, await asyncio.to_thread(link.worker.hello, "test")

    async def give(self, given: Given, choose: Choose) -> bool:
        chosen = await choose(frozenset(self.links))
        if chosen is None:
            return False
        link = self.links[chosen]
        await link._here(link.worker.take, "test", given)
        return True

    async def close(self) -> None:
        for link in (*self.links.values(), *self.ended):
            link.killed = True
            await asyncio.to_thread(link.worker.engine.close)
