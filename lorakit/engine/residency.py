"""Adapters on demand: from the disk into host memory in threads, from there to the device in one copy, unseen by what
runs.

The engine's thread alone asks, and never waits: an adapter that is not there yet is asked for again. Knows adapters
and slots; no request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from lorakit.errors import PoolFullError
from lorakit.runtime.host_cache import HostExtent
from lorakit.runtime.model import MultiLoraModel
from lorakit.runtime.pool import Slot
from lorakit.runtime.roster import Adapter

_MOST_READ = 16
"""Adapters that may lie beside the host cache, read and not yet asked for again."""


class Residency:
    """Brings adapters to the device.

    Attributes:
        full: whether the last adapter that was asked for found no room beside those that are held.
        begun: key → name of adapters whose reading has begun since somebody looked; None where nobody wants to know.
        copy_seconds: from the beginning of each copy to the device until a request found it done, summed.
    """

    def __init__(self, model: MultiLoraModel, *, readers: int, wake: Callable[[], None]) -> None:
        """Loads nothing yet.

        Args:
            model: whose adapters, and whose pool.
            readers: how many are read at the same time.
            wake: called from a thread when one was read.
        """
        self._model = model
        self._wake = wake
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="lorakit-read")
        self._reading: dict[str, Future[HostExtent]] = {}
        self.full = False
        self.begun: dict[str, str] | None = None
        self.copy_seconds = 0.0
        self._copying: dict[str, float] = {}

    def slot(self, adapter: Adapter, *, patient: bool) -> Slot | None:
        """An adapter's slot, with one hold for the caller; None while it is on its way.

        Args:
            adapter: the adapter.
            patient: give a slot only once its copy has arrived, so that no stream waits for it.

        Raises:
            PoolFullError: it would not fit even alone.
            BankCorruptedError, …: it cannot be read.
        """
        self.full = False
        with self._model.lock:
            pool = self._model.pool
            slot = pool.get(adapter.key)
            if slot is None:
                host = self._host(adapter)
                if host is None:
                    return None
                try:
                    slot = pool.put(adapter.key, host, name=adapter.name, pinned=adapter.pinned)
                    self._note_copy(adapter.key)
                except PoolFullError:
                    if not pool.held:
                        raise
                    self.full = True
                    # Kept for the next time, as host memory may have no room for it.
                    self._reading[adapter.key] = _done(host)
                    return None
            ready = slot.ready()
            if ready and adapter.key in self._copying:
                self.copy_seconds += time.monotonic() - self._copying.pop(adapter.key)
            if patient and not ready:
                return None
            pool.acquire([slot])
            return slot

    def read_ahead(self, adapter: Adapter) -> None:
        """Brings an adapter into host memory, if it is not nearer already; its errors come when it is asked for."""
        with self._model.lock:
            if adapter.key not in self._model.pool and adapter.key not in self._model.pool.host:
                self._read(adapter)

    def wait_for(self, adapter: Adapter) -> HostExtent:
        """An adapter in host memory; the caller waits while it is read.

        Raises:
            BankCorruptedError, …: it cannot be read.
        """
        with self._model.lock:
            found = self._model.pool.host.get(adapter.key)
            if found is not None:
                return found
            reading = self._read(adapter)
            del self._reading[adapter.key]
        return reading.result()

    def release(self, slot: Slot) -> None:
        """Ends one hold."""
        with self._model.lock:
            self._model.pool.release([slot])

    def close(self) -> None:
        """Ends the threads; what they read is forgotten."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._reading.clear()

    def _host(self, adapter: Adapter) -> HostExtent | None:
        """The adapter in host memory, or None while it is being read."""
        found = self._model.pool.host.get(adapter.key)
        if found is not None:
            return found
        reading = self._read(adapter)
        if not reading.done():
            return None
        del self._reading[adapter.key]
        return reading.result()

    def _read(self, adapter: Adapter) -> Future[HostExtent]:
        reading = self._reading.get(adapter.key)
        if reading is None:
            self._forget_unwanted()
            pool = self._model.pool
            reading = self._readers.submit(partial(pool.host.read, adapter.source, pool.dtype))
            self._reading[adapter.key] = reading
            if self.begun is not None:
                self.begun[adapter.key] = adapter.name
            reading.add_done_callback(lambda _: self._wake())
        return reading

    def _note_copy(self, key: str) -> None:
        """A copy to the device has begun; those that nobody asked for again are not waited for."""
        self._copying = {key: began for key, began in self._copying.items() if key in self._model.pool}
        self._copying[key] = time.monotonic()

    def _forget_unwanted(self) -> None:
        """Lets go of what was read and not asked for since, its request having been cancelled."""
        done = [key for key, reading in self._reading.items() if reading.done()]
        for key in done[: max(0, len(done) - _MOST_READ)]:
            del self._reading[key]


def _done(host: HostExtent) -> Future[HostExtent]:
    future: Future[HostExtent] = Future()
    future.set_result(host)
    return future
