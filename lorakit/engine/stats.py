"""What an engine is doing, and has done, in numbers."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from lorakit.engine.handle import RequestHandle

EngineState = Literal["new", "ready", "restarting", "dead", "closed"]


class Tier(NamedTuple):
    """Adapters in one kind of memory.

    Attributes:
        adapters: how many lie there.
        nbytes: bytes that they take.
        limit: bytes that they may take; None: no limit.
    """

    adapters: int
    nbytes: int
    limit: int | None


class Loads(NamedTuple):
    """Adapters on their way, since the model was made.

    Attributes:
        reads: adapters that were brought into host memory.
        read_seconds: what that took, summed; several may be read at the same time.
        copies: adapters that were brought to the device.
        copied_bytes: of them.
        copy_seconds: from the beginning of each copy for a request until a step found it done, summed.
        evictions: adapters that made room on the device.
    """

    reads: int
    read_seconds: float
    copies: int
    copied_bytes: int
    copy_seconds: float
    evictions: int


class Usage(NamedTuple):
    """What a tenant has had, and has.

    Attributes:
        requests: that were submitted.
        prompt_tokens: of them, once a request.
        cached_tokens: of these, those that the prefix cache had.
        generated_tokens: of all sequences, of requests under way too.
        running: sequences in the batch.
        waiting: sequences that have not begun.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    running: int = 0
    waiting: int = 0

    def plus(self, other: Usage) -> Usage:
        """The sums."""
        return Usage(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


class Load(NamedTuple):
    """How full an engine is, at little cost.

    Attributes:
        free_blocks: of the key-value cache, those that are free or can be at once.
        running: sequences in the batch.
        steps: forwards since the loop began, or began anew.
    """

    free_blocks: int
    running: int
    steps: int


class EngineStats(NamedTuple):
    """What an engine is doing.

    Attributes:
        state: whether it serves.
        open: requests that have not ended.
        running: sequences of them in the batch, by adapter; None is the base.
        waiting: sequences of them that have not begun, by adapter.
        device: adapters on the device.
        host: adapters in host memory.
        loads: adapters on their way.
        cache_free: the share of the key-value cache that is free or can be at once.
        steps: forwards since the loop began, or began anew.
        segments: adapters that act in each of them, the base being one, summed: segments / steps is how mixed batches
            are.
        tenants: what each tenant that ever asked has had, and has.
        replicas: engines that serve; the other numbers are their sums, `loads`, `steps` and `segments` also of those
            that served before.
    """

    state: EngineState
    open: int
    running: Mapping[str | None, int]
    waiting: Mapping[str | None, int]
    device: Tier
    host: Tier
    loads: Loads
    cache_free: float
    steps: int
    segments: int
    tenants: Mapping[str, Usage]
    replicas: int = 1


class Ledger:
    """The requests of an engine: those that are open, and what those that have ended had. Callable from any thread."""

    def __init__(self) -> None:
        """Has no request yet."""
        self._lock = threading.Lock()
        self._open: dict[str, RequestHandle] = {}
        self._ended: defaultdict[str, Usage] = defaultdict(Usage)

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def open(self, handle: RequestHandle) -> None:
        """A request has come."""
        with self._lock:
            self._open[handle.id] = handle

    def close(self, handle: RequestHandle) -> None:
        """A request has ended."""
        with self._lock:
            del self._open[handle.id]
            self._ended[handle.request.tenant] = self._ended[handle.request.tenant].plus(_had(handle))

    @property
    def handles(self) -> list[RequestHandle]:
        """The requests that have not ended, oldest first."""
        with self._lock:
            return list(self._open.values())

    def drain(self, timeout: float | None) -> bool:
        """Waits until no request is open.

        Args:
            timeout: seconds, or None for as long as it takes.

        Returns:
            Whether none is.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while handles := self.handles:
            if not handles[0].wait(None if end is None else end - time.monotonic()):
                return False
        return True

    def tenants(self) -> dict[str, Usage]:
        """What each tenant has had, and has."""
        with self._lock:
            found = defaultdict(Usage, self._ended)
            for handle in self._open.values():
                now = _had(handle)._replace(running=handle.running, waiting=handle.waiting)
                found[handle.request.tenant] = found[handle.request.tenant].plus(now)
        return dict(found)

    def running(self) -> dict[str | None, int]:
        """Sequences in the batch, by adapter."""
        return _summed((handle.request.adapter, handle.running) for handle in self.handles)

    def waiting(self) -> dict[str | None, int]:
        """Sequences that have not begun, by adapter."""
        return _summed((handle.request.adapter, handle.waiting) for handle in self.handles)


def _summed(counts: Iterable[tuple[str | None, int]]) -> dict[str | None, int]:
    found: Counter[str | None] = Counter()
    for adapter, count in counts:
        found[adapter] += count
    return dict(+found)


def _had(handle: RequestHandle) -> Usage:
    return Usage(
        requests=1,
        prompt_tokens=len(handle.request.prompt),
        cached_tokens=handle.cached,
        generated_tokens=handle.generated,
    )
