"""Which of several servers leads the same replicas.

One at a time does, and each by a term of its own, a number that grows. Whatever changes replicas is asked for by a
term, so a server that was stopped or cut off while another one took over changes nothing that is the other's by now.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lorakit.errors import EngineBusyError, SupersededError


class Seat:
    """Who leads. Of one thread."""

    def __init__(self, lease: float, *, taken: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody leads.

        Args:
            lease: seconds without a word of who leads after which another one may.
            taken: somebody does, and will say so: this seat stands where another one broke down.
            clock: seconds that pass.
        """
        self._lease = lease
        self._clock = clock
        self._term = 0
        self._heard: float | None = clock() if taken else None

    def take(self) -> int:
        """Has another server lead.

        Returns:
            Its term.

        Raises:
            EngineBusyError: one does that has been heard of within the lease.
        """
        if self._heard is not None and (left := self._heard + self._lease - self._clock()) > 0:
            raise EngineBusyError(
                "another server uses these replicas: end it first, or start this one with another --max-requests. "
                f"If it has died, its replicas are free in {max(1, round(left))} s.",
                retry_after=left,
            )
        # By the clock, so that terms grow also from one seat to the next.
        self._term, self._heard = max(self._term + 1, time.time_ns()), self._clock()
        return self._term

    def check(self, term: int) -> None:
        """A server that leads says something.

        Raises:
            SupersededError: it led once.
        """
        if term < self._term:
            raise superseded()
        self._term, self._heard = term, self._clock()

    def leave(self, term: int) -> None:
        """Nobody leads any more.

        Raises:
            SupersededError: another one does.
        """
        self.check(term)
        self._heard = None


def superseded() -> SupersededError:
    """What a server is told that leads no more."""
    return SupersededError(
        "another server has taken over the replicas, as nothing was heard of this one; end it, and start it anew."
    )
