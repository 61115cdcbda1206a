"""An engine that a cluster gives sequences: takes them, tells of their tokens, and gives them back.

Its adapters come from the cluster: it knows them by their contents, and reads them through a function when they are
first asked for. It serves one cluster at a time, the one of the highest term (`seat.py`), and does nothing for any
other; of one that is not heard of for a while it forgets everything.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial

import numpy
import torch

from lorakit.adapters.layout import Extent
from lorakit.engine.engine import Engine
from lorakit.engine.handle import Listener, RequestHandle
from lorakit.engine.stats import EngineStats
from lorakit.errors import BankCorruptedError, EngineError, LorakitError
from lorakit.runtime.host_cache import ExtentReader
from lorakit.scheduler.messages import Ending, Given, Hello, Known, News, Piece
from lorakit.scheduler.seat import superseded
from lorakit.scheduler.snapshot import Limits

_log = logging.getLogger(__name__)

BEAT = 0.5
"""Seconds after which there are news, if only that there are none."""

_GATHER = 0.001  # seconds in which the other rows of a forward get their tokens, too


class _Row:
    """A sequence that was given."""

    __slots__ = ("handle", "seen")

    def __init__(self, handle: RequestHandle) -> None:
        self.handle = handle
        self.seen = 0


class Worker:
    """One engine of a cluster. All methods may be called from any thread."""

    def __init__(self, engine: Engine, fetch: Callable[[str], numpy.ndarray], *, lease: float = 10.0) -> None:
        """Waits for a cluster.

        Args:
            engine: serves already, and nobody else.
            fetch: an adapter's key → its extent as it is stored, (nbytes,) uint8.
            lease: seconds without a word of the cluster after which its sequences are dropped.
        """
        self.engine = engine
        self._fetch = fetch
        self._lease = lease
        self._lock = threading.Lock()
        self._rows: dict[int, _Row] = {}
        self._failed: list[Piece] = []
        self._term = 0
        self._serves = False
        self._heard = time.monotonic()
        self._listener: Listener | None = None
        self._resident: frozenset[str] = frozenset()

    def hello(self, term: int) -> Hello:
        """Serves a cluster from now on.

        Args:
            term: its.

        Raises:
            SupersededError: one of a higher term has come.
            EngineBusyError: the engine is starting anew; it can be met when it has.
        """
        with self._lock:
            self._check_newest(term)
            self._term, self._serves = term, True
            self._heard, self._resident = time.monotonic(), frozenset()
        self.forget_all()
        engine = self.engine
        blocks = engine.capacity // engine.block_tokens
        # The policy keeps a block for the next token of each.
        limits, capacity = Limits(engine.batch, blocks, engine.block_tokens), max(0, blocks - 1) * engine.block_tokens
        return Hello(limits, capacity, engine.stats())

    def beat(self, term: int) -> None:
        """The cluster is there.

        Raises:
            SupersededError, EngineError: it is not this one's, or no more.
        """
        with self._lock:
            self._check(term)
            self._heard = time.monotonic()

    def stats(self) -> EngineStats:
        """What the engine is doing; it may have to wait for that."""
        return self.engine.stats()

    def know(self, term: int, adapters: Iterable[Known]) -> None:
        """Knows adapters; those that are pinned come to the device.

        Raises:
            SupersededError, EngineError: as `beat`.
        """
        self.check(term)
        for known in adapters:
            reader = ExtentReader(known.layout, known.dtype, partial(self._read_into, known))
            self.engine.model.know_adapter(known.name, known.key, reader, known.invocation)
            if known.pinned and self.engine.leads:
                try:
                    self.engine.model.pin_adapter(known.name)
                except LorakitError as error:  # it is served all the same
                    _log.warning("adapter %s cannot be pinned here: %s", known.name, error)

    def forget(self, term: int, names: Iterable[str]) -> None:
        """Forgets adapters, and frees their memory when no sequence needs them any more.

        Raises:
            SupersededError, EngineError: as `beat`.
        """
        self.check(term)
        for name in names:
            if self.engine.model.has_adapter(name):
                self.engine.model.unload_adapter(name)

    def unpin(self, term: int, name: str) -> None:
        """Lets an adapter make room again.

        Raises:
            SupersededError, EngineError: as `beat`.
        """
        self.check(term)
        if self.engine.model.has_adapter(name):
            self.engine.model.unpin_adapter(name)

    def take(self, term: int, given: Given) -> None:
        """Takes a sequence; if it cannot be served, the news tell why.

        Raises:
            SupersededError, EngineError: as `beat`.
        """
        self.check(term)
        try:
            handle = self.engine.take(given.request)
        except Exception as error:  # noqa: BLE001 - told, as what comes later is
            with self._lock:
                self._failed.append(Piece(given.ticket, [], Ending(None, None, 0, None, _portable(error))))
                if self._listener is not None:
                    self._listener.tell()
            return
        with self._lock:
            mine = self._serves and term == self._term
            if mine:
                self._rows[given.ticket] = _Row(handle)
                if self._listener is not None:
                    handle.tell(self._listener)
        if not mine:  # another cluster came meanwhile
            handle.cancel()

    def cancel(self, term: int, tickets: Iterable[int]) -> None:
        """Ends sequences after the token that they are at; the news tell when.

        Raises:
            SupersededError, EngineError: as `beat`.
        """
        self.check(term)
        for ticket in tickets:
            row = self._rows.get(ticket)
            if row is not None:
                row.handle.cancel()

    def forget_all(self) -> None:
        """Ends all sequences; nobody is told of them."""
        with self._lock:
            rows, self._rows, self._failed = list(self._rows.values()), {}, []
        for row in rows:
            row.handle.cancel()

    async def news(self, term: int) -> AsyncIterator[News]:
        """What happens, until the cluster is gone.

        Raises:
            SupersededError, EngineError: as `beat`.
        """
        listener = Listener()
        with self._lock:
            self._check(term)
            self._listener = listener
            handles = [row.handle for row in self._rows.values()]
        for handle in handles:
            handle.tell(listener)
        while True:
            try:
                await asyncio.wait_for(listener.news.wait(), BEAT)
                await asyncio.sleep(_GATHER)
            except TimeoutError:
                pass
            with self._lock:
                self._check(term)
                overdue = time.monotonic() - self._heard > self._lease
                if overdue:
                    self._serves = False
            if overdue:
                self.forget_all()
                return
            listener.look()
            yield self._news()

    def _news(self) -> News:
        with self._lock:
            pieces, self._failed = self._failed, []
            for ticket, row in list(self._rows.items()):
                ended = row.handle.done  # looked at first: then all its tokens are there
                tokens = row.handle.tokens(0, row.seen)
                row.seen += len(tokens)
                if ended:
                    del self._rows[ticket]
                if tokens or ended:
                    pieces.append(Piece(ticket, tokens, _ending(row.handle) if ended else None))
        engine = self.engine
        with engine.model.lock:
            resident = frozenset(engine.model.pool.keys)
        changed, self._resident = resident != self._resident, resident
        load = engine.load()
        return News(pieces, load.free_blocks, resident if changed else None, load.steps, load.running, engine.state)

    def check(self, term: int) -> None:
        """Whether it serves a cluster.

        Raises:
            SupersededError: one of a higher term has come.
            EngineError: it has heard nothing of it for too long, and forgot it.
        """
        with self._lock:
            self._check(term)

    def _check(self, term: int) -> None:
        self._check_newest(term)
        if term != self._term or not self._serves:
            raise EngineError("the replica has heard nothing of this server for too long, and forgot it.")

    def _check_newest(self, term: int) -> None:
        if term < self._term:
            raise superseded()

    def _read_into(self, known: Known, buffer: torch.Tensor) -> Extent:
        found = self._fetch(known.key)
        if found.size != buffer.numel():
            raise BankCorruptedError(
                f"adapter {known.name!r} came with {found.size} bytes instead of {buffer.numel()}; "
                "`lorakit verify` checks its bank."
            )
        numpy.copyto(buffer.numpy(), found)
        return Extent.of_bytes(known.layout, known.dtype, buffer)


def _ending(handle: RequestHandle) -> Ending:
    completion = handle.completion()
    if completion is None:
        error = handle.error
        assert error is not None
        return Ending(None, None, handle.cached, None, _portable(error))
    return Ending(completion.finish_reason, completion.stop, completion.cached_tokens, completion.queued, None)


def _portable(error: BaseException) -> BaseException:
    """An error as another process can read it."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # noqa: BLE001 - other libraries' errors may be anything
        pass
    return EngineError(f"{type(error).__name__}: {error}")
