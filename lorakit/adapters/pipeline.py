"""Blocks of bytes on their way to the disk: hashed and written in a thread, while more are packed.

The thread takes whole blocks, in calls that release Python's lock for long. Packing in threads would not be faster: it
is a few short calls a tensor, and each would wait for the lock.

Knows bytes; knows no adapter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from blake3 import blake3

_DEPTH = 16  # Blocks under way, and so the buffers that there are.


class _Step(NamedTuple):
    begun: Future[None] | None
    buffer: torch.Tensor | None
    then: Callable[[], None] | None


class Pipeline:
    """Hashes and writes blocks in the order sent. Used by one thread; to be closed."""

    def __init__(self) -> None:
        # One alone: a hash depends on the order.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="lorakit-write")
        self._steps: deque[_Step] = deque()
        self._free: list[torch.Tensor] = []
        self._taken: torch.Tensor | None = None

    def buffer(self, nbytes: int) -> torch.Tensor:
        """A buffer for the block that is sent next. It is used again when that is written.

        Args:
            nbytes: its least size.

        Returns:
            (at least nbytes,) uint8 on the CPU.

        Raises:
            BankError: as `finish`.
        """
        if self._taken is None:
            self._wait(_DEPTH - 1)
            self._taken = self._free.pop() if self._free else None
        if self._taken is None or self._taken.numel() < nbytes:
            self._taken = torch.empty(nbytes, dtype=torch.uint8)
        return self._taken

    def send(self, block: memoryview, write: Callable[[memoryview, int], None], place: int, digest: blake3) -> None:
        """Has a block hashed and written.

        Args:
            block: the bytes; they must not change meanwhile.
            write: writes them.
            place: where to.
            digest: is updated.

        Raises:
            BankError: as `finish`.
        """
        self._wait(_DEPTH - 1)

        def work() -> None:
            digest.update(block)
            write(block, place)

        self._steps.append(_Step(self._writer.submit(work), self._taken, None))
        self._taken = None

    def then(self, action: Callable[[], None]) -> None:
        """Calls a function, in the thread that uses the pipeline, when all that was sent before is done."""
        self._steps.append(_Step(None, None, action))

    def finish(self) -> None:
        """Waits until all is done.

        Raises:
            BankError: a block could not be written.
        """
        self._wait(0)

    def close(self) -> None:
        """Lets go of its thread, and of what that has not begun."""
        self._writer.shutdown(wait=True, cancel_futures=True)

    def _wait(self, most: int) -> None:
        """Waits until no more than so many steps are left."""
        while len(self._steps) > most:
            step = self._steps.popleft()
            if step.begun is not None:
                step.begun.result()
            if step.buffer is not None:
                self._free.append(step.buffer)
            if step.then is not None:
                step.then()
