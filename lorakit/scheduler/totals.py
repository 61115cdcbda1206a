"""What replicas have counted, those that are gone among them: Prometheus holds a counter that falls for one anew."""

from __future__ import annotations

from lorakit.engine.stats import EngineStats, Loads


class Totals:
    """Sums over all replicas there ever were, each since it was met. They never fall. May be read from any thread."""

    def __init__(self) -> None:
        """Has counted nothing yet."""
        self._sums: tuple[float, ...] = (0.0,) * (len(Loads._fields) + 2)

    def note(self, before: EngineStats, now: EngineStats) -> None:
        """A replica has told its numbers again.

        Args:
            before: what it told last.
            now: what it tells; a number that is smaller than before began at 0 in between, with the engine's loop.
        """
        pairs = zip(self._sums, _counted(before), _counted(now), strict=True)
        self._sums = tuple(total + (new - old if new >= old else new) for total, old, new in pairs)

    @property
    def loads(self) -> Loads:
        """Adapters that were on their way."""
        reads, read_seconds, copies, copied_bytes, copy_seconds, evictions = self._sums[:-2]
        return Loads(int(reads), read_seconds, int(copies), int(copied_bytes), copy_seconds, int(evictions))

    @property
    def steps(self) -> int:
        """Forwards."""
        return int(self._sums[-2])

    @property
    def segments(self) -> int:
        """Adapters of each of them, the base being one, summed."""
        return int(self._sums[-1])


def _counted(stats: EngineStats) -> tuple[float, ...]:
    return (*stats.loads, stats.steps, stats.segments)
