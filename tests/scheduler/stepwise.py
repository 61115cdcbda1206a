"""A simulation forward by forward, on plain lists: what the fast one must agree with to the last picosecond.

It shares the policy's functions, the costs and the order of events; it has its own loop, its own replicas, and builds
every snapshot anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorakit.scheduler.costs import SECOND
from lorakit.scheduler.fleet import Fleet
from lorakit.scheduler.policy import consolidate, may_release, newest, route, scale_up
from lorakit.scheduler.snapshot import ReplicaView, RequestView

ARRIVAL, COMING, RELEASE, LOOK, CONSOLIDATE = -1, 1 << 40, (1 << 40) + 1, (1 << 40) + 2, (1 << 40) + 3


@dataclass(eq=False)
class Request:
    key: int
    arrival: int
    adapter: int
    rank: int
    prompt: int
    new_tokens: int
    streamed: int = 0
    ready: int | None = None
    reserved: int = 0  # tokens for which blocks are kept while it has not begun
    target: int | None = None
    times: list[int] = field(default_factory=list)

    @property
    def tokens(self):
        return self.prompt + self.streamed


@dataclass(eq=False)
class Engine:
    id: int
    running: list[Request] = field(default_factory=list)
    pending: list[Request] = field(default_factory=list)
    fresh: list[Request] = field(default_factory=list)
    until: int | None = None  # the end of the present forward
    resident: dict[int, int] = field(default_factory=dict)
    empty_since: int = 0

    @property
    def everyone(self):
        return [*self.running, *self.fresh, *self.pending]

    def free(self, limits):
        held = sum(limits.blocks_of(one.tokens) for one in [*self.running, *self.fresh])
        return limits.blocks - held - sum(limits.blocks_of(one.reserved) for one in self.pending)


class Reference:
    def __init__(self, trace, policy, limits, costs, slots, ranks):
        self.policy, self.limits, self.costs, self.slots = policy, limits, costs, slots
        self.arrivals = sorted(
            (
                Request(key, round(one.arrival * SECOND), one.adapter, ranks[one.adapter % len(ranks)],
                        one.prompt_tokens, one.new_tokens)
                for key, one in enumerate(trace)
            ),
            key=lambda one: (one.arrival, one.key),
        )  # fmt: skip
        self.requests = {one.key: one for one in self.arrivals}
        self.left = len(self.arrivals)
        self.engines: dict[int, Engine] = {}
        self.queue: list[Request] = []
        self.timers: list[tuple[int, int, int]] = []  # time, order, number
        self.owned: dict[int, int] = {}
        self.gpu_time = self.moves = self.evictions = self.loads = self.forwards = self.now = 0
        self.finished: dict[int, int] = {}

    # ---- snapshots

    def view(self, engine):
        # A request on its way to or from here is counted, and cannot be moved.
        held = tuple(
            RequestView(one.key, one.arrival, one.tokens, one.adapter, one.rank) for one in engine.everyone
        )  # fmt: skip
        return _View(engine.id, held, engine.free(self.limits), frozenset(engine.resident), still=self.still(engine))

    def still(self, engine):
        return tuple(
            RequestView(one.key, one.arrival, one.tokens, one.adapter, one.rank)
            for one in engine.everyone
            if one.target is None
        )

    def fleet(self):
        return Fleet.of(self.limits.batch, [self.view(engine) for engine in self.engines.values()])

    @property
    def starting(self):
        return sum(order == COMING for _, order, _ in self.timers)

    # ---- the loop

    def run(self):
        self.own_and_serve()
        self.timers.append((round(self.policy.look_every * SECOND), LOOK, 0))
        if self.policy.consolidate_every is not None:
            self.timers.append((round(self.policy.consolidate_every * SECOND), CONSOLIDATE, 0))
        while self.left:
            events = [(time, order, number) for time, order, number in self.timers]
            if self.arrivals:
                events.append((self.arrivals[0].arrival, ARRIVAL, 0))
            for engine in self.engines.values():
                time = self.next_of(engine)
                if time is not None:
                    events.append((time, engine.id, engine.id))
            time, order, number = min(events)
            assert time >= self.now
            self.now = time
            if order == ARRIVAL:
                self.arrive(self.arrivals.pop(0))
            elif order < COMING:
                self.boundary(self.engines[number])
            else:
                self.timers.remove((time, order, number))
                {COMING: self.come, RELEASE: self.release_later, LOOK: self.look, CONSOLIDATE: self.consolidate}[order](
                    number
                )
        for number in list(self.owned):
            self.gpu_time += self.now - self.owned.pop(number)
        return self

    def next_of(self, engine):
        if engine.until is not None:
            return engine.until
        ready = [one.ready for one in engine.pending if one.ready is not None]
        return max(self.now, min(ready)) if ready else None

    def arrive(self, request):
        self.queue.append(request)
        self.admit()
        self.ask()

    def boundary(self, engine):
        if engine.until is not None:
            for one in [*engine.running, *engine.fresh]:
                one.streamed += 1
                one.times.append(self.now)
            engine.running += engine.fresh
            engine.fresh, engine.until = [], None
        done = [one for one in engine.running if one.streamed == one.new_tokens]
        for one in done:
            engine.running.remove(one)
            self.finished[one.key] = self.now
            self.left -= 1
        leaving = sorted((one for one in engine.running if one.target is not None), key=lambda one: one.key)
        for one in leaving:
            engine.running.remove(one)
        evicted = []
        while engine.free(self.limits) < len(engine.everyone):
            candidates = [*engine.running, *(one for one in engine.pending if one.ready is not None)]
            if not candidates:
                break
            one = newest(candidates)
            (engine.running if one in engine.running else engine.pending).remove(one)
            evicted.append(one)
        for one in [*done, *evicted]:
            if one.target is not None:
                target = self.engines[one.target]
                target.pending = [other for other in target.pending if other.key != one.key]
                self.touch(target)
                one.target = None
        for one in evicted:
            self.evictions += 1
            one.ready = None
            self.queue.append(one)
        for one in leaving:
            self.transfer(one)
        self.touch(engine)
        if done or evicted or leaving:
            self.admit()
            if evicted:
                self.ask()
            if not engine.everyone:
                self.emptied(engine)
        if engine.id in self.engines:
            self.begin(engine)

    def begin(self, engine):
        ready = sorted(
            (one for one in engine.pending if one.ready is not None and one.ready <= self.now),
            key=lambda one: (one.arrival, one.key),
        )
        tokens = 0
        for one in ready:
            tokens += one.tokens
            if engine.fresh and tokens > self.costs.prompt_budget:
                break
            engine.fresh.append(one)
            engine.pending.remove(one)
        if not engine.running and not engine.fresh:
            return
        ranks = sum({one.adapter: one.rank for one in [*engine.running, *engine.fresh]}.values())
        context = sum(one.tokens for one in engine.running)
        prompt = sum(one.tokens for one in engine.fresh)
        engine.until = self.now + self.costs.forward(len(engine.running), context, ranks, prompt)
        self.forwards += 1

    # ---- what events do

    def admit(self):
        while self.queue:
            head = min(self.queue, key=lambda one: (one.arrival, one.key))
            number = route(self.fleet(), head, self.limits, self.policy)
            if number is None:
                return
            self.queue.remove(head)
            self.give(head, self.engines[number])

    def give(self, request, engine):
        request.ready = self.bring(request.adapter, engine)
        request.reserved = request.tokens
        engine.pending.append(request)

    def bring(self, adapter, engine):
        if adapter in engine.resident:
            engine.resident[adapter] = engine.resident.pop(adapter)
            return max(self.now, engine.resident[adapter])
        if len(engine.resident) >= self.slots:
            used = {one.adapter for one in engine.everyone}
            del engine.resident[next(one for one in engine.resident if one not in used)]
        self.loads += 1
        engine.resident[adapter] = self.now + self.costs.load
        return engine.resident[adapter]

    def transfer(self, request):
        self.moves += 1
        target = self.engines[request.target]
        request.target = None
        # The one that is here stands for the place that was kept.
        place = next(place for place, one in enumerate(target.pending) if one.key == request.key)
        target.pending[place] = request
        request.reserved = request.tokens
        request.ready = max(self.now, target.resident[request.adapter])

    def consolidate(self, _):
        self.timers.append((self.now + round(self.policy.consolidate_every * SECOND), CONSOLIDATE, 0))
        if self.queue:
            return
        views = [self.view(engine) for engine in self.engines.values()]
        for move in consolidate(views, self.starting, self.limits, self.policy):
            request = self.requests[move.request.key]
            source, target = self.engines[move.source], self.engines[move.target]
            request.target = move.target
            self.bring(request.adapter, target)
            kept = Request(request.key, request.arrival, request.adapter, request.rank, request.prompt, 0)
            kept.reserved, kept.target = move.request.tokens, move.target
            kept.streamed = request.streamed
            target.pending.append(kept)
            if request in source.pending:
                source.pending.remove(request)
                self.transfer(request)
                self.touch(source)
        self.release_empty()

    def look(self, _):
        self.timers.append((self.now + round(self.policy.look_every * SECOND), LOOK, 0))
        self.release_empty()
        self.ask()

    def release_empty(self):
        for engine in list(self.engines.values()):
            if not engine.everyone:
                self.emptied(engine)

    def release_later(self, number):
        engine = self.engines.get(number)
        if engine is not None and not engine.everyone:
            self.emptied(engine)

    def ask(self):
        for _ in range(scale_up(self.fleet(), self.starting, len(self.queue), self.limits, self.policy)):
            self.timers.append((self.now + self.costs.start, COMING, self.own()))

    def own(self):
        number = next(number for number in range(10**6) if number not in self.owned)
        self.owned[number] = self.now
        return number

    def own_and_serve(self):
        number = self.own()
        self.engines[number] = Engine(number, empty_since=self.now)

    def come(self, number):
        self.engines[number] = Engine(number, empty_since=self.now)
        self.admit()
        if not self.engines[number].everyone:
            self.emptied(self.engines[number])

    def touch(self, engine):
        if not engine.everyone:
            engine.empty_since = self.now

    def emptied(self, engine):
        if may_release(self.fleet(), engine.id, self.starting, len(self.queue), self.limits, self.policy):
            wait = engine.empty_since + round(self.policy.linger * SECOND) - self.now
            if wait <= 0:
                del self.engines[engine.id]
                self.gpu_time += self.now - self.owned.pop(engine.id)
            else:
                self.timers.append((self.now + wait, RELEASE, engine.id))


@dataclass(frozen=True)
class _View(ReplicaView):
    """A replica whose requests on their way cannot be moved."""

    still: tuple[RequestView, ...] = ()

    def requests(self):
        return self.still
