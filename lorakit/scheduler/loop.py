"""An event loop in a thread of its own, and its tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from lorakit.errors import SupersededError

_T = TypeVar("_T")

ENDS = (asyncio.CancelledError, SupersededError)
"""What ends a task of a cluster, and is not the fault of whom it asked."""


class Loop:
    """Runs what it is given, one after the other. Of `spawn`, `later` and `cancel`, in its own thread only."""

    def __init__(self, name: str, failed: Callable[[BaseException], object]) -> None:
        """Runs nothing yet.

        Args:
            name: of the thread.
            failed: is told what a task failed by, in the loop.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def runs(self) -> bool:
        """Whether it does."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, whatever is left to do."""
        self.call(self._loop.stop)
        self._thread.join(10)

    def call(self, what: Callable[..., object], *args: Any) -> None:
        """Has something done; once the loop has ended, nothing is."""
        with suppress(RuntimeError):  # it was closed
            self._loop.call_soon_threadsafe(what, *args)

    def result_of(self, work: Coroutine[Any, Any, _T], timeout: float) -> _T:
        """Has something done, and waits for so many seconds.

        Raises:
            TimeoutError: it was not done by then.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def here(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Has something done, for whoever waits in another loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def later(self, seconds: float, what: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Has something done after so many seconds."""
        return self._loop.call_later(seconds, what, *args)

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Begins a task."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def cancel(self) -> list[asyncio.Task[Any]]:
        """Ends all tasks but the one that asks for it."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        return tasks

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)
