"""What tenants use, written down as requests end: a few times a second at most, in a thread of its own."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TypeAlias

from lorakit.engine.handle import RequestHandle
from lorakit.errors import AccountError
from lorakit.server.accounts import Accounts, Used, today
from lorakit.server.faults import log

_Sums: TypeAlias = defaultdict[tuple[str, str, str], list[int]]
"""By day, tenant and adapter: requests, tokens of prompts, tokens generated."""

_EVERY = 0.5
"""Seconds between writings."""


class UsageWriter:
    """Adds up and writes. Callable from any thread."""

    def __init__(self, accounts: Accounts) -> None:
        """Starts the thread.

        Args:
            accounts: where to; its file is opened once more, so that nobody waits for a writing.
        """
        self._accounts = Accounts(accounts.path)
        self._lock = threading.Lock()
        self._new: _Sums = _sums()
        self._writing: _Sums = _sums()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorakit-usage", daemon=True)
        self._thread.start()

    def add(self, handle: RequestHandle) -> None:
        """Counts a request of a tenant's that has ended."""
        request = handle.request
        if not request.tenant:
            return
        key = today(), request.tenant, request.adapter or ""
        with self._lock:
            sums = self._new[key]
            for place, count in enumerate((1, len(request.prompt), handle.generated)):
                sums[place] += count

    def unwritten(self, tenant: str, day: str) -> int:
        """Tokens of a tenant's that the file does not have yet."""
        with self._lock:
            both = (*self._new.items(), *self._writing.items())
            return sum(sum(sums[1:]) for (when, who, _), sums in both if (when, who) == (day, tenant))

    def close(self) -> None:
        """Writes what is left."""
        self._end.set()
        self._thread.join()
        self._write()  # what came while something else could not be written
        self._accounts.close()

    def _run(self) -> None:
        while not self._end.wait(_EVERY):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            # What could not be written last time is tried again before more.
            if not self._writing:
                self._new, self._writing = _sums(), self._new
            rows = [Used(*key, *sums) for key, sums in self._writing.items()]
        if not rows:
            return
        try:
            self._accounts.record(rows)  # may wait for another process; the engine does not
        except AccountError as error:  # the disk may be full
            log.error("usage is not written: %s", error)
            return
        with self._lock:
            self._writing = _sums()


def _sums() -> _Sums:
    return defaultdict(lambda: [0, 0, 0])
