"""A trace on simulated GPUs: discrete events over the functions that decide on real ones.

Events are arrivals, boundaries of a replica at which something happens (`replica.py`), GPUs that come, and the times at
which a scheme looks by itself. Of events at one time arrivals come first, then replicas by their ids, then GPUs that
come, then looks. Repeatable: the same trace and scheme give the same result to the last picosecond.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorakit.errors import ConfigError
from lorakit.scheduler.costs import SECOND, Costs
from lorakit.scheduler.fleet import Fleet
from lorakit.scheduler.job import Job
from lorakit.scheduler.replica import Counts, SimulatedReplica
from lorakit.scheduler.sample import Sample
from lorakit.scheduler.schemes import Scheme
from lorakit.workloads import Asked

_COMING, _RELEASE, _LOOK, _CONSOLIDATE, _SAMPLE = range(1 << 40, (1 << 40) + 5)


@dataclass
class Outcome:
    """What came of a trace.

    Attributes:
        jobs: all requests, in the order of the trace.
        finished: when each was done, in picoseconds, likewise.
        samples: the cluster over time.
        counts: what the replicas did.
        gpu_time: picoseconds of GPUs, from being asked for until they are given back.
        most: GPUs at the same time.
        asked: how many GPUs were asked for, beyond those at the beginning.
        moves: requests that were moved.
        evictions: requests that were evicted.
        end: when the last request was done.
    """

    jobs: list[Job]
    finished: list[int]
    samples: list[Sample] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    gpu_time: int = 0
    most: int = 0
    asked: int = 0
    moves: int = 0
    evictions: int = 0
    end: int = 0


@dataclass(frozen=True)
class Hardware:
    """The GPUs of a simulation.

    Attributes:
        costs: what a replica's work takes.
        slots: adapters that the memory of one holds, beside base and cache.
        ranks: of the adapters: adapter a has ranks[a mod len].
    """

    costs: Costs
    slots: int = 256
    ranks: tuple[int, ...] = (16,)

    def __post_init__(self) -> None:
        if not self.ranks or not all(type(rank) is int and rank > 0 for rank in self.ranks):
            raise ConfigError(f"the adapters' ranks are {self.ranks!r}; give whole numbers of at least 1.")


def simulate(
    trace: Sequence[Asked], scheme: Scheme, hardware: Hardware, *, sample: float | None = 5.0, gaps: bool = False
) -> Outcome:
    """Plays a trace until its last request is done.

    Args:
        trace: the requests, in any order.
        scheme: decides; it keeps what it has learnt, so every simulation takes a new one.
        hardware: the GPUs.
        sample: seconds between samples; None: none are taken.
        gaps: whether times between tokens are recorded.

    Raises:
        ConfigError: the trace is empty, a request is longer than a replica's cache, or a replica holds fewer adapters
            than a batch may have.
    """
    limits = scheme.limits
    if not trace:
        raise ConfigError("the trace has no request.")
    if hardware.slots < limits.batch:
        raise ConfigError(
            f"a GPU has room for {hardware.slots} adapters, and a batch may have {limits.batch}: give it as many."
        )
    for place, one in enumerate(trace):
        if limits.blocks_of(one.prompt_tokens + one.new_tokens) >= limits.blocks:
            raise ConfigError(
                f"request {place} of the trace has {one.prompt_tokens} + {one.new_tokens} tokens, and a replica's "
                f"cache {limits.blocks} blocks of {limits.block_tokens}, of which one stays free: give it more, or cut "
                "the request."
            )
    return _Simulation(trace, scheme, hardware, sample, Counts(gaps=gaps)).run()


class _Simulation:
    """One run."""

    def __init__(
        self, trace: Sequence[Asked], scheme: Scheme, hardware: Hardware, sample: float | None, counts: Counts
    ) -> None:
        ranks = hardware.ranks
        jobs = [Job(key, one, ranks[one.adapter % len(ranks)]) for key, one in enumerate(trace)]
        self._arrivals = sorted(jobs, key=lambda job: (job.arrival, job.key))
        self._outcome = Outcome(jobs, [-1] * len(jobs), counts=counts)
        self._scheme = scheme
        self._limits = scheme.limits
        self._hardware = hardware
        self._counts = counts
        self._now = 0
        self._fleet = Fleet(scheme.limits.batch)
        self._queue = scheme.queue()
        self._replicas: dict[int, SimulatedReplica] = {}  # serving or draining
        self._owned: dict[int, int] = {}  # GPU → since when it is paid for
        self._free: list[int] = []  # numbers that were given back
        self._next = 0
        self._present = -1  # the replica whose boundary this is
        self._starting = 0
        self._ongoing = 0
        self._left = len(jobs)
        self._expected: dict[int, int] = {}  # job that leaves → tokens that its target keeps room for
        self._events: list[tuple[int, int, int, int]] = []  # time, order, number, version
        self._sample = sample

    def run(self) -> Outcome:
        """Until every request is done."""
        for _ in range(self._scheme.initial):
            self._serve(self._own())
        self._every(self._scheme.every, _LOOK)
        self._every(self._scheme.consolidate_every, _CONSOLIDATE)
        if self._sample is not None:
            self._push(0, _SAMPLE)
        events, arrivals = self._events, self._arrivals
        place = 0
        while self._left:
            if place < len(arrivals) and (not events or arrivals[place].arrival <= events[0][0]):
                self._now = arrivals[place].arrival
                self._arrive(arrivals[place])
                place += 1
                continue
            now, order, number, version = heapq.heappop(events)
            assert now >= self._now
            if order < _COMING:
                replica = self._replicas.get(number)
                if replica is None or replica.version != version:
                    continue
                self._now = now
                self._boundary(replica)
                continue
            self._now = now
            self._other(order, number)
        self._outcome.end = self._now
        for number in list(self._owned):
            self._pay(number)
        return self._outcome

    # ---- events

    def _arrive(self, job: Job) -> None:
        self._ongoing += 1
        if not len(self._queue):
            number = self._scheme.route(self._fleet, job, -1, self._now / SECOND)
            if number is not None:
                self._give(job, number)
            else:
                self._queue.add(job)
        else:
            self._queue.add(job)
            if self._queue.passable:
                self._admit(-1)
        self._ask()

    def _boundary(self, replica: SimulatedReplica) -> None:
        now = self._now
        self._present = replica.id
        finished, evicted, left = replica.end(now)
        for job in finished:
            self._outcome.finished[job.key] = now
            self._left -= 1
            self._ongoing -= 1
            self._call_off(job)
        for job in evicted:
            job.leave(now, evicted=True)
            self._outcome.evictions += 1
            self._call_off(job)
            self._queue.add(job)
        for job in left:
            self._transfer(job)
        if finished or evicted or left:
            self._fleet.resize(replica.id, replica.working_set)
            if len(self._queue):
                # Only here has room come; draining replicas are not in the fleet.
                self._admit(1 << replica.id)
                if evicted:
                    self._admit(-1)
                    self._ask()
            if not replica.working_set:
                self._emptied(replica)
        self._present = -1
        self._push_boundary(replica, replica.begin(now))

    def _other(self, order: int, number: int) -> None:
        if order == _COMING:
            self._starting -= 1
            self._serve(number)
            self._admit(-1)
            if number in self._fleet and not self._replicas[number].working_set:
                self._emptied(self._replicas[number])
        elif order == _RELEASE:
            replica = self._replicas.get(number)
            if replica is not None and not replica.working_set:
                self._emptied(replica)
        elif order == _LOOK:
            self._look()
            self._every(self._scheme.every, _LOOK)
        elif order == _CONSOLIDATE:
            self._consolidate()
            self._every(self._scheme.consolidate_every, _CONSOLIDATE)
        else:
            self._take_sample()
            assert self._sample is not None
            self._every(self._sample, _SAMPLE)

    def _look(self) -> None:
        serving, owned = len(self._fleet), len(self._owned)
        change = self._scheme.ask_regularly(self._now / SECOND, self._ongoing, serving + self._starting, owned)
        for _ in range(change):
            self._start()
        if change < 0:
            # Those with the fewest requests are drained; those that start are left to come.
            fewest = sorted(self._fleet, key=lambda one: one.working_set)
            for replica in fewest[: min(-change, serving - 1)]:
                self._fleet.remove(replica.id)
                if not replica.working_set:
                    self._release(replica.id)
        self._release_empty()
        self._ask()

    def _release_empty(self) -> None:
        for number in [one.id for one in self._fleet if not one.working_set]:
            self._emptied(self._replicas[number])

    def _consolidate(self) -> None:
        if len(self._queue):
            return
        for move in self._scheme.consolidate(self._fleet, self._starting):
            job = self._outcome.jobs[move.request.key]
            source, target = self._replicas[move.source], self._replicas[move.target]
            tokens = move.request.tokens
            job.target = move.target
            self._expected[job.key] = tokens
            target.expect(job, tokens, self._now, self._fleet)
            self._fleet.resize(target.id, target.working_set)
            self._plan(target)  # its cache is full sooner
            if source.leave(job):
                self._transfer(job)
                self._fleet.resize(source.id, source.working_set)
            self._plan(source)
        self._release_empty()

    # ---- what events do

    def _give(self, job: Job, number: int) -> None:
        replica = self._replicas[number]
        job.placed = True
        replica.place(job, self._now, self._fleet)
        self._fleet.resize(number, replica.working_set)
        self._plan(replica)

    def _transfer(self, job: Job) -> None:
        """A job has left its replica and comes to the one that keeps a place for it."""
        job.leave(self._now, evicted=False)
        self._outcome.moves += 1
        target = self._replicas[job.target]
        job.target = -1
        target.arrive(job, self._expected.pop(job.key), self._now)
        self._plan(target)

    def _call_off(self, job: Job) -> None:
        """A job that was to be moved is done or evicted."""
        if job.target >= 0:
            target = self._replicas[job.target]
            job.target = -1
            target.cancel(job, self._expected.pop(job.key))
            self._fleet.resize(target.id, target.working_set)
            if len(self._queue):
                self._admit(1 << target.id)
            self._plan(target)

    def _admit(self, among: int) -> None:
        """Lets in who waits, in order, as long as there is room among a set of replicas."""
        again = True
        while again:
            again = False
            for job in self._queue.heads():
                number = self._scheme.route(self._fleet, job, among, self._now / SECOND)
                if number is not None:
                    self._queue.take(job)
                    self._give(job, number)
                    again, among = True, -1  # the next one was not tried anywhere yet
                    break

    def _plan(self, replica: SimulatedReplica) -> None:
        if replica.id != self._present:  # which goes on when all has been decided
            self._push_boundary(replica, replica.next(self._now))

    def _push_boundary(self, replica: SimulatedReplica, time: int | None) -> None:
        replica.version += 1
        if time is not None:
            heapq.heappush(self._events, (time, replica.id, replica.id, replica.version))

    def _ask(self) -> None:
        draining = len(self._replicas) - len(self._fleet)
        for _ in range(self._scheme.ask(self._fleet, self._starting, len(self._queue), draining)):
            self._start()

    def _start(self) -> None:
        number = self._own()
        self._outcome.asked += 1
        self._starting += 1
        heapq.heappush(self._events, (self._now + self._hardware.costs.start, _COMING, number, 0))

    def _own(self) -> int:
        if self._free:
            number = heapq.heappop(self._free)
        else:
            number, self._next = self._next, self._next + 1
        self._owned[number] = self._now
        self._outcome.most = max(self._outcome.most, len(self._owned))
        return number

    def _serve(self, number: int) -> None:
        hardware = self._hardware
        replica = SimulatedReplica(
            number, self._now, lambda: self._now, self._limits, hardware.costs, hardware.slots, self._counts
        )
        self._replicas[number] = replica
        self._fleet.add(replica)

    def _emptied(self, replica: SimulatedReplica) -> None:
        """A replica has no request: it goes, now or after a while, if the scheme lets it."""
        if replica.id not in self._fleet:
            self._release(replica.id)
        elif self._scheme.may_release(self._fleet, replica.id, self._starting, len(self._queue)):
            wait = replica.empty_since + round(self._scheme.linger * SECOND) - self._now
            if wait <= 0:
                self._fleet.remove(replica.id)
                self._release(replica.id)
            else:
                self._push(wait, _RELEASE, replica.id)

    def _release(self, number: int) -> None:
        del self._replicas[number]
        self._pay(number)
        heapq.heappush(self._free, number)

    def _pay(self, number: int) -> None:
        self._outcome.gpu_time += self._now - self._owned.pop(number)

    def _take_sample(self) -> None:
        sets = {number: replica.working_set for number, replica in self._replicas.items()}
        for number in self._owned.keys() - sets.keys():
            sets[number] = 0
        self._outcome.samples.append(Sample(self._now / SECOND, len(self._owned), len(self._queue), sets))

    def _every(self, seconds: float | None, order: int) -> None:
        if seconds is not None:
            self._push(round(seconds * SECOND), order)

    def _push(self, wait: int, order: int, number: int = 0) -> None:
        heapq.heappush(self._events, (self._now + wait, order, number, 0))
