"""A replica in simulated time, in closed form.

Between two events (a request joins, ends, leaves, or the cache runs full) the batch is the same, and each forward is
longer than the one before by the same amount: every row attends to one more token. So k forwards take

    T(k) = k · first + rows · context · k (k − 1) / 2

and the number of forwards until a time is a root of it. A replica is looked at when something happens to it, however
many tokens lie between. All sums are of whole picoseconds, and equal to those of a simulation forward by forward to the
last one.

Blocks of the cache likewise: in k forwards each row takes a block every `block_tokens` forwards; rows are counted by
the forward in which they take their next one.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lorakit.scheduler.costs import Costs
from lorakit.scheduler.fleet import Fleet
from lorakit.scheduler.job import Job
from lorakit.scheduler.policy import newest
from lorakit.scheduler.snapshot import Limits


class Gap(NamedTuple):
    """Times between tokens of some rows: the first of so many forwards, and how much longer each next one takes."""

    first: int
    growth: int
    forwards: int
    rows: int


class Counts:
    """What replicas did, summed over all of a simulation.

    Attributes:
        forwards: of all replicas.
        rows: rows of each forward, summed.
        segments: distinct adapters of each, summed.
        busy: picoseconds in forwards.
        loads: adapters that came to a device.
        gaps: times between tokens, if they are recorded.
    """

    def __init__(self, *, gaps: bool = False) -> None:
        self.forwards = 0
        self.rows = 0
        self.segments = 0
        self.busy = 0
        self.loads = 0
        self.gaps: list[Gap] | None = [] if gaps else None


class Ended(NamedTuple):
    """What a boundary between forwards brought: requests that are done, that were evicted, and that leave."""

    finished: list[Job]
    evicted: list[Job]
    left: list[Job]


class SimulatedReplica:
    """One engine on one GPU. See `snapshot.Replica` for what a policy reads."""

    def __init__(
        self, number: int, now: int, clock: Callable[[], int], limits: Limits, costs: Costs, slots: int, counts: Counts
    ) -> None:
        """Is idle and holds no adapter.

        Args:
            number: its id.
            now: picoseconds.
            clock: gives the present time.
            limits: what it holds.
            costs: what its work takes.
            slots: adapters that its device memory holds; at least a batch of different ones.
            counts: where it counts.
        """
        assert slots >= limits.batch
        self.id = number
        self.working_set = 0
        self.ranks = 0
        self.version = 0
        self.empty_since = now
        self._clock = clock
        self.limits = limits
        self._costs = costs
        self._slots = slots
        self._counts = counts
        # As of the last boundary that was looked at, `since`: forwards done, rows, tokens of their contexts, blocks.
        self._since = now
        self._steps = 0
        self._rows: dict[int, tuple[Job, int]] = {}  # key → job, and the number of the forward that began it
        self._context = 0
        self._used = 0
        self._reserved = 0
        self._phases = [0] * limits.block_tokens  # rows that take a block in forwards of this number, modulo its size
        self._ends: list[tuple[int, int]] = []  # number of the forward after which a row is done, key
        self._planned = 0
        self._fresh: list[Job] | None = None  # those that the present forward begins
        self._until = 0  # the end of that forward
        self._pending: list[tuple[int, Job]] = []  # when a job can begin (-1: it has yet to come), job
        self._leaving: set[int] = set()
        self._active: dict[int, int] = {}  # adapter → rows of forwards
        self._active_ranks = 0
        self._using: dict[int, int] = {}  # adapter → jobs of the working set
        self._resident: OrderedDict[int, int] = OrderedDict()  # adapter → when it is there, last used last

    # ---- what a policy reads

    @property
    def resident(self) -> int:
        """How many adapters lie in its device memory."""
        return len(self._resident)

    @property
    def free_blocks(self) -> int:
        """Blocks of its cache that are free now."""
        left = self.limits.blocks - self._used - self._reserved
        if self._fresh is None and self._rows:
            elapsed = self._clock() - self._since
            if elapsed > 0:
                left -= self._gained(self._steps_until(elapsed) - 1)
        return left

    def uses(self, adapter: int) -> bool:
        """Whether a job of its working set has this adapter."""
        return adapter in self._using

    def holds(self, adapter: int) -> bool:
        """Whether an adapter lies in its device memory, or is on its way there."""
        return adapter in self._resident

    def requests(self) -> Iterator[Held]:
        """Its working set as of now, without those that are about to leave or to come."""
        done = self._steps
        if self._fresh is None and self._rows:
            elapsed = self._clock() - self._since
            if elapsed > 0:
                done += self._steps_until(elapsed) - 1
        for job, began in self._rows.values():
            if job.target < 0:
                yield Held(job, job.tokens + done - began)
        for _, job in self._pending:
            if job.target < 0:
                yield Held(job, job.tokens)

    # ---- jobs come and go

    def place(self, job: Job, now: int, fleet: Fleet) -> None:
        """Gives it a job, which begins with the first forward after its adapter has come."""
        self._admit(job, self._bring(job.adapter, now, fleet))

    def expect(self, job: Job, tokens: int, now: int, fleet: Fleet) -> None:
        """Keeps a place and blocks for a job that is about to leave another replica; its adapter comes beforehand."""
        self._bring(job.adapter, now, fleet)
        self._admit(job, -1, tokens)

    def arrive(self, job: Job, tokens: int, now: int) -> None:
        """A job that was expected with so many tokens has come."""
        place = next(place for place, (_, one) in enumerate(self._pending) if one is job)
        self._reserved += self.limits.blocks_of(job.tokens) - self.limits.blocks_of(tokens)
        self._pending[place] = (max(now, self._resident[job.adapter]), job)

    def cancel(self, job: Job, tokens: int) -> None:
        """A job that was expected with so many tokens does not come."""
        self._pending = [entry for entry in self._pending if entry[1] is not job]
        self._reserved -= self.limits.blocks_of(tokens)
        self._forget(job)

    def leave(self, job: Job) -> bool:
        """Lets a job leave at the next boundary; True if it had not begun and has left already."""
        for _, one in self._pending:
            if one is job:
                self._drop_pending(job)
                return True
        self._leaving.add(job.key)
        return False

    def _admit(self, job: Job, ready: int, tokens: int | None = None) -> None:
        self._pending.append((ready, job))
        self._reserved += self.limits.blocks_of(job.tokens if tokens is None else tokens)
        self.working_set += 1
        using = self._using.get(job.adapter, 0)
        self._using[job.adapter] = using + 1
        if not using:
            self.ranks += job.rank

    def _bring(self, adapter: int, now: int, fleet: Fleet) -> int:
        """Has an adapter in device memory, in the place of the one unused for longest; gives the time when it is."""
        ready = self._resident.get(adapter)
        if ready is not None:
            self._resident.move_to_end(adapter)
            return max(now, ready)
        if len(self._resident) >= self._slots:
            gone = next(one for one in self._resident if one not in self._using)
            del self._resident[gone]
            fleet.drop(gone, self.id)
        self._counts.loads += 1
        self._resident[adapter] = now + self._costs.load
        fleet.hold(adapter, self.id)
        return now + self._costs.load

    def _forget(self, job: Job) -> None:
        self.working_set -= 1
        left = self._using[job.adapter] - 1
        if left:
            self._using[job.adapter] = left
        else:
            del self._using[job.adapter]
            self.ranks -= job.rank
        if not self.working_set:
            self.empty_since = self._clock()

    def _drop_pending(self, job: Job) -> None:
        self._pending = [entry for entry in self._pending if entry[1] is not job]
        self._reserved -= self.limits.blocks_of(job.tokens)
        self._forget(job)

    # ---- time

    def begin(self, now: int) -> int | None:
        """Goes on from a boundary, which `end` came to: what is ready joins the next forward.

        Returns:
            When something happens next, or None while it is idle.
        """
        if self._pending:
            fresh = self._joining(now)
            if fresh:
                return self._begin_prompts(fresh, now)
        return self.next(now)

    def next(self, now: int) -> int | None:
        """The next boundary at which something happens, after jobs came or went; None while it is idle."""
        if self._fresh is not None:
            return self._until
        if not self._rows:
            times = [ready for ready, _ in self._pending if ready >= 0]
            return max(now, min(times)) if times else None
        last, _ = self._ends[0]
        count = last - self._steps
        if self._leaving:
            count = min(count, self._steps_until(self._clock() - self._since))
        for ready, _ in self._pending:
            if ready >= 0:
                count = min(count, self._steps_until(ready - self._since))
        limit = self.limits.blocks - self._reserved - self.working_set
        if self._used + len(self._rows) * (count // self.limits.block_tokens + 1) > limit:
            # Full in the middle of a forward, as a job has come with a token more than was expected: at its end.
            count = min(count, max(self._steps_to_fill(limit), self._steps_until(now - self._since)))
        self._planned = count
        return self._since + self._time(count)

    def end(self, now: int) -> Ended:
        """Comes to the boundary that `begin` named: tokens are there, and who is done or has to go leaves."""
        if self._fresh is not None:
            self._end_prompts(now)
        elif self._rows:
            self._advance(self._planned, now)
        else:
            self._since = now
        finished = []
        while self._ends and self._ends[0][0] <= self._steps:
            _, key = heapq.heappop(self._ends)
            job, began = self._rows[key]
            self._take_off(job, began)
            finished.append(job)
        left = []
        for key in sorted(self._leaving & self._rows.keys()):
            job, began = self._rows[key]
            self._detach(job, began)
            left.append(job)
        self._leaving.clear()
        return Ended(finished, self._evict(), left)

    def _evict(self) -> list[Job]:
        """While a forward's tokens might find no block: the newest goes; one that has yet to come cannot."""
        evicted = []
        while self.limits.blocks - self._used - self._reserved < self.working_set:
            waiting = [job for ready, job in self._pending if ready >= 0]
            jobs = [*(job for job, _ in self._rows.values()), *waiting]
            if not jobs:
                break
            job = newest(jobs)
            assert isinstance(job, Job)
            if job.key in self._rows:
                self._detach(job, self._rows[job.key][1])
            else:
                self._drop_pending(job)
            evicted.append(job)
        return evicted

    def _joining(self, now: int) -> list[Job]:
        """The jobs whose prompts the next forward takes, the oldest first."""
        ready = sorted((job.arrival, job.key, job) for ready, job in self._pending if 0 <= ready <= now)
        fresh: list[Job] = []
        tokens = 0
        for _, _, job in ready:
            tokens += job.tokens
            if fresh and tokens > self._costs.prompt_budget:
                break
            fresh.append(job)
        return fresh

    def _begin_prompts(self, fresh: list[Job], now: int) -> int:
        block = self.limits.block_tokens
        prompt = 0
        rows, context = len(self._rows), self._context
        for job in fresh:
            tokens = job.tokens
            prompt += tokens
            blocks = self.limits.blocks_of(tokens)
            self._reserved -= blocks
            self._used += blocks
            self._rows[job.key] = job, self._steps
            self._phases[(self._steps - tokens) % block] += 1
            heapq.heappush(self._ends, (self._steps + job.new_tokens - job.streamed, job.key))
            active = self._active.get(job.adapter, 0)
            self._active[job.adapter] = active + 1
            if not active:
                self._active_ranks += job.rank
        if len(fresh) == len(self._pending):
            self._pending = []
        else:
            begun = {job.key for job in fresh}
            self._pending = [entry for entry in self._pending if entry[1].key not in begun]
        self._fresh = fresh
        self._context += prompt
        self._until = now + self._costs.forward(rows, context, self._active_ranks, prompt)
        return self._until

    def _end_prompts(self, now: int) -> None:
        assert self._fresh is not None
        self._record(now - self._since, 0, 1, len(self._rows) - len(self._fresh))
        self._used += self._phases[self._steps % self.limits.block_tokens]
        self._steps += 1
        self._context += len(self._rows)
        for job in self._fresh:
            job.token(now)
        self._fresh = None
        self._since = now

    def _advance(self, count: int, now: int) -> None:
        if count:
            rows = len(self._rows)
            if self._counts.gaps is not None:
                self._counts.gaps.append(Gap(self._first(), rows * self._costs.context, count, rows))
            self._used += self._gained(count)
            self._steps += count
            self._context += rows * count
            counts = self._counts
            counts.forwards += count
            counts.rows += count * rows
            counts.segments += count * len(self._active)
            counts.busy += now - self._since
        self._since = now

    def _record(self, took: int, growth: int, count: int, rows: int) -> None:
        counts = self._counts
        counts.forwards += count
        counts.rows += count * len(self._rows)
        counts.segments += count * len(self._active)
        counts.busy += took
        if counts.gaps is not None and rows:
            counts.gaps.append(Gap(took, growth, count, rows))

    def _detach(self, job: Job, began: int) -> None:
        """Takes a job off that is not done."""
        self._ends.remove((began + job.new_tokens - job.streamed, job.key))
        heapq.heapify(self._ends)
        self._take_off(job, began)
        job.streamed += self._steps - began

    def _take_off(self, job: Job, began: int) -> None:
        tokens = job.tokens + self._steps - began
        del self._rows[job.key]
        self._context -= tokens
        self._used -= self.limits.blocks_of(tokens)
        self._phases[(began - job.tokens) % self.limits.block_tokens] -= 1
        left = self._active[job.adapter] - 1
        if left:
            self._active[job.adapter] = left
        else:
            del self._active[job.adapter]
            self._active_ranks -= job.rank
        self._forget(job)

    # ---- sums over forwards

    def _first(self) -> int:
        return self._costs.forward(len(self._rows), self._context, self._active_ranks)

    def _time(self, count: int) -> int:
        return count * self._first() + len(self._rows) * self._costs.context * (count * (count - 1) // 2)

    def _steps_until(self, elapsed: int) -> int:
        """The fewest forwards that take at least so long."""
        if elapsed <= 0:
            return 0
        first, growth = self._first(), len(self._rows) * self._costs.context
        count: int
        if growth:
            linear = first - growth / 2
            count = int((math.sqrt(linear * linear + 2.0 * growth * elapsed) - linear) / growth)
        else:
            count = elapsed // first
        # The root is a float's; the sums decide.
        while count * first + growth * (count * (count - 1) // 2) < elapsed:
            count += 1
        while count and (count - 1) * first + growth * ((count - 1) * (count - 2) // 2) >= elapsed:
            count -= 1
        return count

    def _gained(self, count: int) -> int:
        """Blocks that the rows take in so many forwards."""
        if count <= 0:
            return 0
        block = self.limits.block_tokens
        rounds, rest = divmod(count, block)
        found = rounds * len(self._rows)
        if rest:
            begin = self._steps % block
            end = begin + rest
            found += sum(self._phases[begin:end]) + (sum(self._phases[: end - block]) if end > block else 0)
        return found

    def _steps_to_fill(self, limit: int) -> int:
        """The fewest forwards, at least one, after which more than so many blocks are used."""
        rows, block = len(self._rows), self.limits.block_tokens
        rounds = max(0, (limit - self._used) // rows)
        used = self._used + rounds * rows
        count = rounds * block
        while True:
            used += self._phases[(self._steps + count) % block]
            count += 1
            if used > limit:
                return count


class Held(NamedTuple):
    """A job of a working set, with its tokens as of now. See `snapshot.Request`."""

    job: Job
    tokens: int

    @property
    def key(self) -> int:
        """Its place in the trace."""
        return self.job.key

    @property
    def arrival(self) -> int:
        """When it came."""
        return self.job.arrival

    @property
    def adapter(self) -> int:
        """Its adapter."""
        return self.job.adapter

    @property
    def rank(self) -> int:
        """Of its adapter."""
        return self.job.rank
