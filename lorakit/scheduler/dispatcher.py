"""The sequences of a cluster: they wait, are given to replicas, move between them, and survive them.

All decisions are those of `policy.py`, and all of them are taken in one thread. What a sequence has generated is known
here, so that any replica can go on with it: one that is moved, evicted, or whose replica dies begins anew elsewhere
with its prompt and its tokens, in its old place of the queue. No token is lost or given twice.

A move: the target keeps a place and reads the adapter; the source ends the sequence after the token that it is at; its
last tokens come, and then the target is given all of it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from lorakit.engine.handle import FinishReason, RequestHandle, Token
from lorakit.engine.tenants import Tenants
from lorakit.errors import (
    AdapterNotFoundError,
    ConfigError,
    DeadlineExceededError,
    EngineBusyError,
    EngineCrashedError,
    EngineError,
    EngineStoppedError,
    RequestError,
    SupersededError,
)
from lorakit.scheduler.catalog import Catalog, Change
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.fleet import Fleet
from lorakit.scheduler.flight import Counted, Flight
from lorakit.scheduler.links import Links
from lorakit.scheduler.live import LiveReplica
from lorakit.scheduler.loop import ENDS, Loop
from lorakit.scheduler.messages import Ending, Given, News
from lorakit.scheduler.policy import Policy, consolidate, may_release, newest, route, scale_up
from lorakit.scheduler.presence import Presence, Told
from lorakit.scheduler.queues import FairFcfs
from lorakit.scheduler.sample import Sample
from lorakit.scheduler.snapshot import Limits
from lorakit.scheduler.target import Target
from lorakit.scheduler.totals import Totals

_log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two looks at what nobody tells, at most
_SEND_AGAIN = 0.2  # seconds after which a sequence that did not reach its replica is sent again


class Dispatcher:
    """Has replicas serve sequences. What has no underscore may be called from any thread.

    Attributes:
        policy: which replica, and how many.
        superseded: the error, once another server has taken over the replicas; from then on nothing is done any more.
    """

    def __init__(self, links: Links, catalog: Catalog, policy: Policy, config: ClusterConfig, tenants: Tenants) -> None:
        """Begins nothing yet.

        Args:
            links: reach the replicas.
            catalog: the adapters.
            policy: which replica, and how many.
            config: the settings.
            tenants: counts, weights and caps.
        """
        self.policy = policy
        self.superseded: SupersededError | None = None
        self._links = links
        self._catalog = catalog
        self._config = config
        self._tenants = tenants
        self._loop = Loop("lorakit-cluster", self._task_failed)
        self._first: Future[None] = Future()
        # What follows is the loop's alone.
        self._presence = Presence(
            links, catalog, config, policy.most, self._loop, Told(self._came, self._drain, self._hear, self._lose)
        )
        self._target = Target(links, max(1, policy.least), config.silence)
        self._fleet = Fleet(1)
        self._queue: FairFcfs[Flight] = self._new_queue()
        self._aside: list[Flight] = []  # too long for the replicas that are there
        self._flights: dict[str, list[Flight]] = {}  # by the ids of their requests
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._adapters: dict[str, int] = {}  # numbers of adapters' contents
        self._tickets = itertools.count()
        self._consolidated = 0.0
        self._looked = self._needed = time.monotonic()

    # ---- for a cluster

    def start(self) -> None:
        """Has the first replicas begin, and waits for one of them.

        Raises:
            EngineError: no replica could begin, or came in time.
            EngineBusyError: another server uses the replicas.
            SupersededError: another server took them over meanwhile.
        """
        self._loop.start()
        self._catalog.follow(lambda change: self._loop.call(self._changed, change))
        self._loop.call(self._begin)
        try:
            self._first.result(self._config.start_timeout)
        except TimeoutError:
            seconds = self._config.start_timeout
            raise EngineError(f"no replica came within {seconds:.0f} s; are there GPUs free?") from None

    def close(self) -> None:
        """Ends all replicas, and the loop."""
        if self._loop.runs:
            with suppress(Exception):
                self._loop.result_of(self._end(), 60)
            self._loop.stop()

    @property
    def replicas(self) -> list[LiveReplica]:
        """The replicas, to be looked at."""
        return list(self._presence.replicas.values())

    @property
    def limits(self) -> Limits:
        """What the replica holds that came last."""
        return self._presence.limits

    @property
    def capacity(self) -> int:
        """The most tokens that one sequence may have on any replica that has come; 0 before."""
        return self._presence.capacity

    @property
    def totals(self) -> Totals:
        """What all replicas have counted."""
        return self._presence.totals

    def sample(self, since: float) -> Sample:
        """The cluster now; see `Cluster.sample`."""
        replicas, serving = self.replicas, len(self._fleet)
        return Sample(
            seconds=time.monotonic() - since,
            gpus=max(0, len(replicas) - serving) + max(self._target.count, serving),
            waiting=len(self._queue),
            working_sets={replica.id: replica.working_set for replica in replicas},
        )

    def arrive(self, handle: RequestHandle, flights: list[Flight]) -> None:
        """A request has come, and its sequences wait."""
        for flight in flights:
            self._count(flight, "waiting")
        self._loop.call(self._arrive, handle, flights)

    def withdraw(self, handle: RequestHandle) -> None:
        """A request is over, wherever its sequences are."""
        self._loop.call(self._withdraw, handle)

    # ---- the beginning and the end

    def _begin(self) -> None:
        self._loop.spawn(self._open())

    def _task_failed(self, error: BaseException) -> None:
        if isinstance(error, SupersededError):
            self._step_down(error)
        else:
            _log.error("the cluster's loop failed in a part", exc_info=error)

    async def _open(self) -> None:
        try:
            await self._links.lead()
            self._loop.spawn(self._lead())
            await self._links.open(self._target.count)
        except BaseException as error:  # noqa: BLE001 - told to whoever starts it
            self._fail_start(error)
            return
        self._loop.spawn(self._presence.watch())
        self._loop.spawn(self._look())

    def _fail_start(self, error: BaseException) -> None:
        if not self._first.done():
            self._first.set_exception(error)

    async def _lead(self) -> None:
        """Says that this server leads, as long as it does."""
        while True:
            await asyncio.sleep(self._config.beat)
            try:
                await asyncio.wait_for(self._links.lead(), self._config.silence)
            except ENDS:
                raise
            except Exception as error:  # noqa: BLE001 - it may be starting anew
                _log.warning("nobody hears that this server leads the replicas: %s", error)

    def _step_down(self, error: SupersededError) -> None:
        """Another server has taken over the replicas: what is left here is to say so."""
        if self.superseded is not None:
            return
        _log.error("%s", error)
        self.superseded = error
        self._loop.cancel()
        self._presence.close()
        self._fail_start(error)
        for flights in list(self._flights.values()):
            flights[0].handle.fail(error)
            for flight in flights:
                self._close(flight)
        for replica in self.replicas:
            self._forget(replica)

    async def _end(self) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*map(self._presence.let_go, self.replicas)), 5.0)
        if tasks := self._loop.cancel():
            await asyncio.wait(tasks, timeout=1.0)
        await self._links.close()

    # ---- replicas come and go

    def _came(self, replica: LiveReplica) -> None:
        """A replica serves."""
        self._fleet.add(replica)
        if not self._first.done():
            self._first.set_result(None)
            self._loop.spawn(self._target.tell())  # those that a server before this one has left may be others
        aside, self._aside = self._aside, []
        for flight in aside:
            self._queue.add(flight)
        self._admit()

    def _drain(self, replica: LiveReplica) -> None:
        """A replica is about to end: what it has moves, or ends there."""
        if not replica.draining:
            replica.draining = True
            self._fleet.remove(replica.id)
            for flight in replica.expected:
                self._call_off(flight)
            _log.info("replica %s is drained", replica.name)
        for flight in sorted(replica.requests(), key=lambda one: (one.arrival, one.key)):
            target = route(self._fleet, flight, self.limits, self.policy, self._among(flight))
            if target is not None:
                self._move(flight, target)
        if not replica.working_set:
            self._forget(replica)
            self._loop.spawn(self._presence.let_go(replica))

    def _lose(self, replica: LiveReplica, reason: str, kill: bool = True) -> None:
        """A replica is gone, or given up: what it had begins anew elsewhere.

        Args:
            replica: it.
            reason: why.
            kill: whether it is ended; if not, it may be met again.
        """
        if not self._presence.has(replica):
            return
        _log.warning("replica %s is lost: %s", replica.name, reason)
        self._forget(replica)
        if kill:
            self._presence.end(replica)
        for flight in replica.expected:
            self._call_off(flight)
        flights = list(replica.flights.values())
        for flight in flights:
            self._call_off(flight)
            self._ground(flight)
        for flight in flights:
            flight.deaths += kill
            if flight.deaths >= self._config.tries:
                died = f"{flight.deaths} replicas died with the request, the last by: {reason}"
                self._fail(flight, EngineCrashedError(died))
            self._again(flight)
        self._admit()
        self._ask()

    def _forget(self, replica: LiveReplica) -> None:
        self._presence.forget(replica)
        if not replica.draining:
            self._fleet.remove(replica.id)

    # ---- sequences come and go

    def _arrive(self, handle: RequestHandle, flights: list[Flight]) -> None:
        self._flights[handle.id] = flights
        if self.superseded is not None:
            handle.fail(self.superseded)
            for flight in flights:
                self._close(flight)
            return
        if handle.request.deadline is not None:
            left = handle.submitted + handle.request.deadline - time.monotonic()
            self._timers[handle.id] = self._loop.later(max(0.0, left), self._overdue, handle)
        for flight in flights:
            self._queue.add(flight)
        self._admit()
        self._ask()

    def _admit(self) -> None:
        """Gives who waits to replicas, in order, as long as there is room."""
        again = True
        while again:
            again = False
            for flight in list(self._queue.heads()):
                if flight.over or flight.handle.done:
                    self._queue.take(flight)
                    self._close(flight)
                    again = True
                    break
                error: BaseException | None = self._renew(flight)
                among = self._among(flight)
                nowhere = len(self._fleet) and not self._fleet.everyone & among
                if nowhere and error is None:
                    error = flight.error  # all that there are could not serve it
                if nowhere and error is None:
                    self._queue.take(flight)
                    self._set_aside(flight)
                    again = True
                    break
                if error is not None:
                    self._queue.take(flight)
                    self._fail(flight, error)
                    self._close(flight)
                    again = True
                    break
                number = route(self._fleet, flight, self.limits, self.policy, among)
                if number is not None:
                    self._queue.take(flight)
                    self._give(flight, number)
                    again = True
                    break

    def _among(self, flight: Flight) -> int:
        """The set of replicas that may serve a sequence: they are large enough, and have not failed to."""
        return ~sum(
            1 << replica.id
            for replica in self.replicas
            if replica.capacity < flight.cost or replica.name in flight.avoid
        )

    def _set_aside(self, flight: Flight) -> None:
        """A sequence is too long for the replicas that are there: others pass it, until another replica comes."""
        if not flight.placed:
            self._queue.refund(flight, flight.cost)
        self._aside.append(flight)

    def _fail_aside(self) -> None:
        """All replicas have come that were asked for, and some sequences are too long for each of them."""
        aside, self._aside = self._aside, []
        for flight in aside:
            longest = max((replica.capacity for replica in self.replicas), default=0)
            self._fail(
                flight,
                EngineError(
                    f"the request may have {flight.cost} tokens, and the replicas that are there by now hold "
                    f"{longest}; try it again when there are larger ones, or shorten it."
                ),
            )
            self._close(flight)

    def _give(self, flight: Flight, number: int) -> None:
        flight.replica, flight.ticket, flight.given = number, next(self._tickets), time.monotonic()
        flight.placed, flight.begun, flight.leaving = True, False, False
        flight.been.append(number)
        self._count(flight, "running")
        replica = self._presence.replicas[number]
        replica.add(flight)
        self._fleet.resize(number, replica.working_set)
        self._loop.spawn(self._send(flight, flight.ticket))

    async def _send(self, flight: Flight, ticket: int) -> None:
        given = Given(ticket, flight.request)
        try:
            await self._introduce(flight)
            sent = await self._links.give(given, partial(self._choose, flight, ticket))
        except ENDS:
            raise
        except Exception as error:  # noqa: BLE001 - the replica may have died, or never got it
            await asyncio.sleep(_SEND_AGAIN)
            if flight.ticket == ticket:
                self._bounce(flight, error)
            return
        if flight.ticket != ticket:
            return
        if not sent:
            self._back(flight)
        elif flight.leaving:  # it was taken back before it was there
            await self._take_back(self._presence.replicas[flight.replica], ticket)

    async def _choose(self, flight: Flight, ticket: int, ids: frozenset[str]) -> str | None:
        """As `_choose_here`, in any event loop."""
        return await self._loop.here(self._choose_here(flight, ticket, ids))

    async def _choose_here(self, flight: Flight, ticket: int, ids: frozenset[str]) -> str | None:
        """The replica that keeps a sequence its place; None: it is about to end, and the policy is asked anew."""
        self._presence.sync(ids)
        if flight.ticket == ticket and not flight.over:
            replica = self._presence.replicas.get(flight.replica)
            if replica is not None and not replica.draining:
                return replica.name
            self._back(flight)
        return None

    async def _introduce(self, flight: Flight) -> None:
        """Has a sequence's replica know its adapter."""
        replica = self._presence.replicas.get(flight.replica)
        if replica is not None and flight.known is not None and flight.known.name not in replica.knows:
            known = flight.known
            await asyncio.wait_for(replica.link.know([known._replace(pinned=False)]), self._config.silence)
            replica.knows.add(known.name)

    def _bounce(self, flight: Flight, error: BaseException) -> None:
        """A sequence could not be sent."""
        _log.warning("a sequence of %s did not reach its replica: %s", flight.handle.id, error)
        flight.deaths += 1
        if flight.deaths >= self._config.tries:
            self._fail(flight, EngineError(f"the request reached no replica, try it again: {error}"))
        self._back(flight)

    def _back(self, flight: Flight) -> None:
        """A sequence is on no replica any more, and waits again."""
        self._call_off(flight)
        self._ground(flight)
        self._again(flight)
        self._admit()

    def _ground(self, flight: Flight) -> None:
        """A sequence is on no replica any more."""
        replica = self._presence.replicas.get(flight.replica)
        if replica is not None:
            replica.remove(flight.ticket)
            self._fleet.resize(replica.id, replica.working_set)
        flight.replica = flight.ticket = -1
        flight.leaving = flight.begun = False

    def _again(self, flight: Flight) -> None:
        """A sequence waits again, in its old place, unless it is over."""
        if flight.over or flight.handle.done or self._is_complete(flight):
            self._close(flight)
            return
        self._count(flight, "waiting")
        self._queue.add(flight)

    def _is_complete(self, flight: Flight) -> bool:
        """Ends a sequence whose last token came without its end, as its replica died then, or it was just leaving."""
        request, tokens = flight.handle.request, flight.generated
        stops = bool(tokens) and tokens[-1] in request.stop_token_ids
        if not stops and len(tokens) < request.max_new_tokens:
            return False
        reason: FinishReason = "stop" if stops else "length"
        stop = tokens[-1] if stops else None
        flight.handle.finish(flight.sequence, reason, stop, cached=flight.cached, joined=flight.joined)
        return True

    def _renew(self, flight: Flight) -> AdapterNotFoundError | None:
        """A sequence that has no token yet gets its adapter as it is now: another may have come under its name.

        Returns:
            The error, if there is none any more.
        """
        name = flight.handle.request.adapter
        if name is None or flight.generated:
            return None
        try:
            known = self._catalog.hold(name)
        except AdapterNotFoundError as error:
            return None if flight.placed else error  # what has begun goes on with what it has
        self._drop(flight)
        flight.known = flight.held = known
        flight.rank = known.rank
        flight.adapter = self._number_of(known.key)
        return None

    def _drop(self, flight: Flight) -> None:
        """A sequence needs its adapter no more."""
        held, flight.held = flight.held, None
        if held is not None:
            self._catalog.release(held)

    def _hear(self, replica: LiveReplica, news: News) -> None:
        """A replica has said something."""
        if news.state == "dead":
            self._lose(replica, "its engine is down")
            return
        room = False
        for piece in news.pieces:
            flight = replica.flights.get(piece.ticket)
            if flight is None:
                continue
            if piece.tokens:
                self._got(flight, piece.tokens)
            if piece.ending is not None:
                self._landed(replica, flight, piece.ending)
                room = True
        if news.resident is not None:
            self._note_residents(replica, news.resident)
        while replica.is_full:
            leaving = [flight for flight in replica.requests() if flight.begun]
            if len(leaving) < 2:
                break
            evicted = newest(leaving)
            assert isinstance(evicted, Flight)
            evicted.evictions += 1
            self._leave(evicted)
        if room or len(self._queue):
            self._admit()
        if replica.draining:
            self._drain(replica)

    def _got(self, flight: Flight, tokens: Sequence[Token]) -> None:
        if flight.joined is None:
            flight.joined = time.monotonic()
        flight.begun = True
        for token in tokens:
            flight.generated.append(token.id)
            flight.handle.add(flight.sequence, token.id, token.logprob, token.top)

    def _landed(self, replica: LiveReplica, flight: Flight, ending: Ending) -> None:
        """A replica has ended a sequence."""
        target, left = flight.target, flight.leaving
        if not flight.moves + flight.evictions + flight.deaths:
            flight.cached = ending.cached
            if ending.queued is not None:
                flight.joined = flight.given + ending.queued
        if ending.error is not None:
            self._call_off(flight)
            self._failed(replica, flight, ending.error)
            return
        self._ground(flight)
        if flight.over or flight.handle.done:
            self._call_off(flight)
            self._close(flight)
        elif ending.reason == "cancelled" and left:
            if target in self._fleet and not self._is_complete(flight):
                flight.target = -1
                flight.moves += 1
                self._give(flight, target)
            else:
                self._call_off(flight)
                self._again(flight)
        elif ending.reason == "cancelled":  # nobody here took it back: the replica forgot all, or begins anew
            self._call_off(flight)
            self._again(flight)
        else:
            self._call_off(flight)
            assert ending.reason is not None
            flight.handle.finish(
                flight.sequence, ending.reason, ending.stop, cached=flight.cached, joined=flight.joined
            )
            self._close(flight)

    def _failed(self, replica: LiveReplica, flight: Flight, error: BaseException) -> None:
        """A replica cannot serve a sequence; another one may."""
        self._ground(flight)
        if isinstance(error, RequestError | ConfigError):
            self._fail(flight, error)
        elif isinstance(error, EngineBusyError):
            replica.told = 0  # until it says otherwise
        elif isinstance(error, EngineCrashedError | EngineStoppedError):
            flight.deaths += 1
            if flight.deaths >= self._config.tries:
                self._fail(flight, error)
        else:
            if isinstance(error, AdapterNotFoundError) and flight.known is not None:
                replica.knows.discard(flight.known.name)
            flight.avoid.add(replica.name)
            flight.error = error
            others = {one.name for one in self.replicas if not one.draining} - flight.avoid
            if not others or len(flight.avoid) >= self._config.tries:
                self._fail(flight, error)
        self._again(flight)

    def _fail(self, flight: Flight, error: BaseException) -> None:
        flight.over = True
        flight.handle.fail(error)
        self._withdraw(flight.handle)

    def _withdraw(self, handle: RequestHandle) -> None:
        """A request is over, wherever its sequences are."""
        for flight in self._flights.get(handle.id, []):
            flight.over = True
            self._call_off(flight)
            if flight.ticket >= 0:
                self._leave(flight)
            elif self._queue.remove(flight):
                self._close(flight)
            elif flight in self._aside:
                self._aside.remove(flight)
                self._close(flight)
        self._admit()

    def _overdue(self, handle: RequestHandle) -> None:
        if handle.done:
            return
        request = handle.request
        handle.fail(
            DeadlineExceededError(
                f"request {handle.id} was not done {request.deadline} s after its submission; it has "
                f"{handle.generated} of up to {request.n * request.max_new_tokens} tokens. Give it more time."
            )
        )
        self._withdraw(handle)

    def _count(self, flight: Flight, how: Counted | None) -> None:
        """Counts a sequence as waiting, as running, or no more."""
        change = {"waiting": 0, "running": 0}
        if flight.counted is not None:
            change[flight.counted] -= 1
        if how is not None:
            change[how] += 1
        flight.counted = how
        self._tenants.count(flight.tenant, **change)

    def _close(self, flight: Flight) -> None:
        """A sequence has ended, and is nowhere any more."""
        flight.over = True
        self._count(flight, None)
        self._drop(flight)
        flights = self._flights.get(flight.handle.id, [])
        if all(one.counted is None for one in flights):
            self._flights.pop(flight.handle.id, None)
            timer = self._timers.pop(flight.handle.id, None)
            if timer is not None:
                timer.cancel()
        if flight.placed:
            self._queue.refund(flight, flight.handle.request.max_new_tokens - len(flight.generated))

    # ---- moves

    def _move(self, flight: Flight, target: int) -> None:
        """Has a sequence go to another replica."""
        replica = self._presence.replicas[target]
        flight.target = target
        replica.expect(flight)
        self._fleet.resize(target, replica.working_set)
        self._leave(flight)

    def _leave(self, flight: Flight) -> None:
        """Takes a sequence back; it is done when its replica says so."""
        replica = self._presence.replicas.get(flight.replica)
        if replica is not None and not flight.leaving:
            flight.leaving = True
            self._loop.spawn(self._take_back(replica, flight.ticket))

    async def _take_back(self, replica: LiveReplica, ticket: int) -> None:
        # What it was never sent, or has ended, it says nothing of.
        with suppress(Exception):
            await replica.link.cancel([ticket])

    def _call_off(self, flight: Flight) -> None:
        """A sequence that was to be moved stays, or is over."""
        if flight.target >= 0:
            replica = self._presence.replicas.get(flight.target)
            flight.target = -1
            if replica is not None:
                replica.call_off(flight)
                self._fleet.resize(replica.id, replica.working_set)

    # ---- what is looked at regularly

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(min(self.policy.look_every, _LOOK))
            try:
                self._look_once(time.monotonic())
            except Exception:  # noqa: BLE001 - one look may fail, and the next must come
                _log.exception("the cluster could not be looked at")

    def _look_once(self, now: float) -> None:
        # The rest of a longer time, this process was held up and heard nobody.
        seconds, self._looked = min(now - self._looked, _LOOK), now
        for replica in self.replicas:
            if replica.silent > self._config.silence:
                self._lose(replica, f"no news for {self._config.silence:.0f} s")
            elif replica.flights and replica.still > self._config.stuck:
                self._lose(replica, f"no forward for {self._config.stuck:.0f} s")
            elif replica.draining:
                self._drain(replica)
            replica.wait(seconds)  # judged at the next look: what it has said by now may be heard before
        every = self.policy.consolidate_every
        if every is not None and now - self._consolidated >= every and not len(self._queue):
            self._consolidated = now
            self._consolidate()
        self._admit()
        if self._aside and self._target.count <= len(self._fleet):
            self._fail_aside()
        self._ask()
        self._release(now)
        if len(self._queue) or self._target.count <= len(self._fleet):
            self._needed = now
        elif now - self._needed > self.policy.linger:  # those that did not come are not needed any more
            self._scale(max(self.policy.least, len(self._fleet)))

    def _consolidate(self) -> None:
        for move in consolidate(self._fleet, self._starting, self.limits, self.policy):
            assert isinstance(move.request, Flight)
            if 1 << move.target & self._among(move.request):
                self._move(move.request, move.target)

    @property
    def _starting(self) -> int:
        return max(0, self._target.count - len(self._fleet))

    def _ask(self) -> None:
        draining = len(self.replicas) - len(self._fleet)
        more = scale_up(self._fleet, self._starting, len(self._queue), self.limits, self.policy, draining)
        if more > 0:
            self._scale(max(self._target.count, len(self._fleet)) + more)

    def _release(self, now: float) -> None:
        """Gives back a replica that has been empty for long enough; one at a time."""
        if self._target.count > len(self._fleet) or len(self.replicas) > self._target.count:
            return
        for replica in list(self._fleet):
            assert isinstance(replica, LiveReplica)
            waited = not replica.working_set and now - replica.empty_since >= self.policy.linger
            if waited and may_release(
                self._fleet, replica.id, self._starting, len(self._queue), self.limits, self.policy
            ):
                self._scale(self._target.count - 1)
                return

    def _scale(self, count: int) -> None:
        count = max(1, self.policy.least, min(count, self.policy.most))
        if count != self._target.count:
            _log.info("%d replicas are wanted instead of %d", count, self._target.count)
            self._target.count = count
            self._loop.spawn(self._target.tell())

    # ---- adapters

    def _number_of(self, key: str) -> int:
        """What stands for an adapter's content."""
        return self._adapters.setdefault(key, len(self._adapters))

    def _note_residents(self, replica: LiveReplica, keys: frozenset[str]) -> None:
        if not replica.draining:
            for key in keys - replica.resident_keys:
                self._fleet.hold(self._number_of(key), replica.id)
            for key in replica.resident_keys - keys:
                self._fleet.drop(self._number_of(key), replica.id)
        replica.resident_keys = keys

    def _changed(self, change: Change) -> None:
        if change.gone is not None and self._catalog.is_needed(change.gone):  # it came again meanwhile
            return
        for replica in self.replicas:
            self._loop.spawn(self._tell(replica, change))

    async def _tell(self, replica: LiveReplica, change: Change) -> None:
        with suppress(Exception):
            if change.gone is not None and change.gone.name in replica.knows:
                replica.knows.discard(change.gone.name)
                await replica.link.forget([change.gone.name])
            if change.pinned is not None:
                await replica.link.know([change.pinned])
                replica.knows.add(change.pinned.name)
            if change.unpinned is not None:
                await replica.link.unpin(change.unpinned.name)

    def _new_queue(self) -> FairFcfs[Flight]:
        return FairFcfs(
            lambda flight: flight.tenant,
            lambda tenant: self._tenants.policy(str(tenant)).weight,
            self._tenants.may_run,
        )
