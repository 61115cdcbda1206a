"""A replica of a cluster as its policy sees it. See `snapshot.Replica`."""

from __future__ import annotations

import time
from collections.abc import Iterator

from lorakit.engine.stats import EngineStats
from lorakit.scheduler.flight import Flight
from lorakit.scheduler.links import Link
from lorakit.scheduler.messages import Hello, News
from lorakit.scheduler.snapshot import Limits


class LiveReplica:
    """One replica.

    Attributes:
        id: its number among the replicas.
        name: what its carrier calls it.
        link: how it is reached.
        limits: what it holds.
        capacity: the most tokens that one sequence may have there.
        flights: ticket → sequence that it has, those among them that are leaving.
        knows: names of adapters that it was told.
        told: free blocks of its cache, as it said last.
        resident_keys: of adapters in its device memory.
        silent: seconds since it said something, as far as this process listened.
        still: the same since it did a forward, or had nothing to do.
        empty_since: since when it has had no sequence.
        draining: whether it is given nothing any more.
        stats: its engine's, as it told last.
    """

    def __init__(self, id: int, name: str, link: Link, hello: Hello) -> None:
        """Has nothing yet."""
        self.id = id
        self.name = name
        self.link = link
        self.limits: Limits = hello.limits
        self.capacity = hello.capacity
        self.flights: dict[int, Flight] = {}
        self.knows: set[str] = set()
        self.told = hello.limits.blocks
        self.resident_keys: frozenset[str] = frozenset()
        self.silent = self.still = 0.0
        self.empty_since = time.monotonic()
        self.draining = False
        self.stats: EngineStats = hello.stats
        self._expected: dict[int, tuple[Flight, int]] = {}
        self._steps = 0

    @property
    def working_set(self) -> int:
        """Sequences that it has, and those that are about to come."""
        return len(self.flights) + len(self._expected)

    @property
    def free_blocks(self) -> int:
        """Blocks of its cache that are free, and not promised."""
        fresh = (flight.tokens for flight in self.flights.values() if not flight.begun)
        promised = (*fresh, *(tokens for _, tokens in self._expected.values()))
        return self.told - sum(map(self.limits.blocks_of, promised))

    @property
    def ranks(self) -> int:
        """The ranks of its adapters, each once."""
        return sum({flight.adapter: flight.rank for flight in self._all()}.values())

    @property
    def resident(self) -> int:
        """How many adapters lie in its device memory."""
        return len(self.resident_keys)

    def uses(self, adapter: int) -> bool:
        """Whether a sequence of its has this adapter."""
        return any(flight.adapter == adapter for flight in self._all())

    def requests(self) -> Iterator[Flight]:
        """Its sequences, without those that are about to leave or to come."""
        return (flight for flight in self.flights.values() if not flight.leaving)

    @property
    def is_full(self) -> bool:
        """Whether the next tokens might find no block, even when all that leave are gone."""
        leaving = [flight.tokens for flight in self.flights.values() if flight.leaving]
        room = self.free_blocks + sum(map(self.limits.blocks_of, leaving))
        return room < self.working_set - len(leaving)

    def expect(self, flight: Flight) -> None:
        """Keeps a place and blocks for a sequence that is about to leave another replica."""
        self._expected[flight.key] = flight, flight.tokens

    def call_off(self, flight: Flight) -> None:
        """Keeps them no more."""
        self._expected.pop(flight.key, None)
        self._note_empty()

    @property
    def expected(self) -> list[Flight]:
        """Sequences that are about to come."""
        return [flight for flight, _ in self._expected.values()]

    def add(self, flight: Flight) -> None:
        """It has a sequence."""
        self._expected.pop(flight.key, None)
        self.flights[flight.ticket] = flight

    def remove(self, ticket: int) -> Flight | None:
        """It has a sequence no more."""
        flight = self.flights.pop(ticket, None)
        self._note_empty()
        return flight

    def hear(self, news: News) -> None:
        """It said something."""
        self.silent = 0.0
        if news.steps != self._steps or not self.flights:
            self.still = 0.0
        self._steps, self.told = news.steps, news.free_blocks

    def wait(self, seconds: float) -> None:
        """It was listened to for so long."""
        self.silent += seconds
        self.still += seconds

    def _all(self) -> Iterator[Flight]:
        yield from self.flights.values()
        yield from self.expected

    def _note_empty(self) -> None:
        if not self.working_set:
            self.empty_since = time.monotonic()
