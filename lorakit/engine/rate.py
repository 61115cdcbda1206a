"""How fast sequences end: what those are told for whom there is no place."""

from __future__ import annotations

import threading
import time


class Rate:
    """How fast sequences end, of late."""

    def __init__(self) -> None:
        """Knows of none."""
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._per_second = 0.0

    def count(self, sequences: int) -> None:
        """So many have ended."""
        with self._lock:
            now = time.monotonic()
            elapsed = max(now - self._since, 1e-3)
            # An average over about the last ten.
            self._per_second += 0.1 * (sequences / elapsed - self._per_second)
            self._since = now

    def seconds_for(self, sequences: int) -> float:
        """After how long so many places should be free: a second at least, a minute at most."""
        with self._lock:
            return min(60.0, max(1.0, sequences / self._per_second if self._per_second else 1.0))
