"""Punica's scheduling policy (Chen et al., MLSys 2024, section 5): pure functions from snapshots to decisions.

    fits         a place in the batch, and blocks for the request and for one more token of every request
    route        among the replicas where it fits, the one with the largest working set; ties go to the highest id
    newest       who leaves when the cache runs full: the newest, with its arrival and what it has streamed
    scale_up     how many GPUs to ask for, so that some lightly loaded one is left
    may_release  whether an empty replica can go
    consolidate  which requests to move, so that lightly loaded replicas empty out

Requests wait in the order of their arrival; if the oldest fits nowhere, none behind it is looked at (`queues.py`).
Every constant that the paper leaves open is a field of `Policy`, and so is every extension of ours.

Replicas may be unlike: what each holds is its own `limits`, and those that a function is given count for the others.

Knows no clock, no engine and no GPU: the simulator and a cluster decide by the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorakit.errors import ConfigError
from lorakit.scheduler.fleet import Fleet, numbers
from lorakit.scheduler.snapshot import Limits, Replica, Request


@dataclass(frozen=True)
class Policy:
    """What the paper leaves open, and what goes beyond it.

    Attributes:
        light: a replica is lightly loaded while its working set is at most this share of a batch, and as much of its
            cache is free as then has to be.
        headroom: lightly loaded replicas to keep, those that start among them.
        headroom_share: the same as a share of the replicas; the larger one counts.
        ask_at: from so many waiting requests on a GPU is asked for on their behalf.
        backlog: batches of waiting requests for which one GPU is asked: places become free while it starts.
        least: replicas that stay, also without requests.
        most: replicas there may be.
        linger: seconds for which an empty replica stays.
        look_every: seconds between two looks at what no request gives cause to: empty replicas that can go by now.
        consolidate_every: seconds between consolidations; None: never.
        consolidate_below: only working sets of at most this share of a batch are moved away.
        spare: places that a consolidation leaves free in the replicas that stay, beside the headroom.
        move_tokens: the price of a move: so many tokens may be computed again to empty one replica.
        affinity: among replicas with equal working sets, prefer one that holds the adapter.
        affinity_slack: by so many requests a holder's working set may be smaller and still count as equal.
        rank_budget: the ranks of a working set's adapters, each adapter once, may sum up to so much; None: to anything.
    """

    light: float = 0.75
    headroom: int = 0
    headroom_share: float = 0.0
    ask_at: int = 4
    backlog: int = 4
    least: int = 1
    most: int = 16
    linger: float = 15.0
    look_every: float = 1.0
    consolidate_every: float | None = 5.0
    consolidate_below: float = 0.5
    spare: int = 64
    move_tokens: int = 16384
    affinity: bool = False
    affinity_slack: int = 0
    rank_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("light", "consolidate_below", "headroom_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"the policy's {name} is {getattr(self, name)!r}; give a share, 0 to 1.")
        lowest_of = {
            "headroom": 0,
            "ask_at": 1,
            "backlog": 1,
            "least": 0,
            "most": 1,
            "spare": 0,
            "move_tokens": 0,
            "affinity_slack": 0,
        }
        for name, lowest in lowest_of.items():
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise ConfigError(f"the policy's {name} is {value!r}; give a whole number of at least {lowest}.")
        if self.least > self.most:
            raise ConfigError(f"the policy keeps at least {self.least} replicas and at most {self.most}.")
        if not 0 <= self.linger < math.inf:
            raise ConfigError(f"the policy's linger is {self.linger!r}; give seconds, 0 or more.")
        for name in ("look_every", "consolidate_every"):
            seconds = getattr(self, name)
            if not (seconds is None and name == "consolidate_every") and not 0 < seconds < math.inf:
                raise ConfigError(f"the policy's {name} is {seconds!r}; give seconds, more than 0.")
        if self.rank_budget is not None and self.rank_budget < 1:
            raise ConfigError(f"the policy's rank_budget is {self.rank_budget}; give at least an adapter's rank.")


def spare_of(replicas: int, batch: int = Limits().batch) -> int:
    """`Policy.spare` for other than the 16 replicas of 32 places that its default was chosen for: the same share."""
    return Policy.spare * replicas * batch // (Policy.most * Limits().batch)


class Move(NamedTuple):
    """One request goes from one replica to another, which computes its tokens again."""

    request: Request
    source: int
    target: int


def fits(replica: Replica, request: Request, limits: Limits, policy: Policy) -> bool:
    """Whether a replica has a place for a request, and blocks for it and for one more token of every request."""
    held, limits = replica.working_set, replica.limits or limits
    if held >= limits.batch or replica.free_blocks < limits.blocks_of(request.tokens) + held + 1:
        return False
    budget = policy.rank_budget
    # An adapter beyond the whole budget is served alone rather than never.
    return budget is None or not held or replica.uses(request.adapter) or replica.ranks + request.rank <= budget


def route(fleet: Fleet, request: Request, limits: Limits, policy: Policy, among: int = -1) -> int | None:
    """The replica that a request goes to, or None where it has to wait.

    Args:
        fleet: the replicas.
        request: it.
        limits: of a replica that has none of its own.
        policy: which preferences apply.
        among: only this set of replicas; -1: all.
    """
    if policy.affinity:
        return _route_near(fleet, request, limits, policy, among)
    for _, replicas in fleet.fullest_first():
        for number in numbers(replicas & among):
            if fits(fleet[number], request, limits, policy):
                return number
    return None


def _route_near(fleet: Fleet, request: Request, limits: Limits, policy: Policy, among: int) -> int | None:
    """As `route`; a holder is taken whose working set is smaller than the fullest one's by the slack at most."""
    holders = fleet.holders(request.adapter)
    best: tuple[int, int] | None = None
    for size, replicas in fleet.fullest_first():
        if best is not None and size < best[0] - policy.affinity_slack:
            break
        near = replicas & among & holders
        for number in numbers(near):
            if fits(fleet[number], request, limits, policy):
                return number
        if best is None:
            for number in numbers(replicas & among & ~holders):
                if fits(fleet[number], request, limits, policy):
                    best = size, number
                    break
    return best and best[1]


def newest(requests: Iterable[Request]) -> Request:
    """The request that is evicted first: the one that arrived last."""
    return max(requests, key=lambda one: (one.arrival, one.key))


def is_light(replica: Replica, limits: Limits, policy: Policy) -> bool:
    """Whether a replica is lightly loaded, in places and in memory."""
    limits = replica.limits or limits
    if replica.working_set > policy.light * limits.batch:
        return False
    return replica.free_blocks >= (1 - policy.light) * limits.blocks


def scale_up(fleet: Fleet, starting: int, waiting: int, limits: Limits, policy: Policy, draining: int = 0) -> int:
    """How many GPUs to ask for.

    Args:
        fleet: the replicas.
        starting: GPUs that were asked for and are not there yet.
        waiting: requests that fit nowhere.
        limits: of a replica to come.
        policy: the thresholds.
        draining: replicas that still run requests but are given no new ones.
    """
    room = policy.most - len(fleet) - starting - draining
    if room <= 0:
        return 0
    owned = len(fleet) + starting
    wanted = max(policy.headroom, math.ceil(policy.headroom_share * owned))
    if waiting >= policy.ask_at:
        wanted += -(-waiting // (limits.batch * policy.backlog))
    wanted = max(wanted, policy.least - owned + starting)
    missing = wanted - starting
    if missing <= 0:
        return 0
    return min(room, missing - _light_ones(fleet, missing, limits, policy))


def _light_ones(fleet: Fleet, enough: int, limits: Limits, policy: Policy) -> int:
    """How many replicas are lightly loaded; no more than `enough` are counted."""
    found = 0
    for size, replicas in fleet.emptiest_first():
        if size > policy.light * fleet.batch:
            break
        for number in numbers(replicas):
            found += is_light(fleet[number], limits, policy)
            if found == enough:
                return found
    return found


def may_release(fleet: Fleet, number: int, starting: int, waiting: int, limits: Limits, policy: Policy) -> bool:
    """Whether an empty replica can go: enough replicas are left, and enough lightly loaded ones among them."""
    if fleet[number].working_set or waiting or len(fleet) - 1 < policy.least:
        return False
    wanted = max(policy.headroom, math.ceil(policy.headroom_share * (len(fleet) - 1 + starting)))
    missing = wanted - starting
    return missing <= 0 or _light_ones(fleet, missing + 1, limits, policy) > missing


def consolidate(replicas: Iterable[Replica], starting: int, limits: Limits, policy: Policy) -> list[Move]:
    """Which requests to move off the least loaded replicas onto busier ones, so that the former empty out.

    A replica is emptied whole or left alone, and only if it can then be released. One that was given requests is not
    emptied in the same call. Every call that moves anything leaves fewer replicas with work, so calls come to an end.

    Args:
        replicas: those that are neither starting nor draining.
        starting: GPUs that were asked for and are not there yet.
        limits: of a replica that has none of its own.
        policy: threshold and price.
    """
    rooms = _Rooms(replicas, limits, policy)
    moves: list[Move] = []
    for room in sorted(rooms.all, key=lambda room: (room.size, room.replica.id)):
        if room.size > policy.consolidate_below * room.limits.batch or room.size == 0 or room.given:
            continue
        requests = list(room.replica.requests())
        if len(requests) < room.size:  # some are on their way already
            continue
        if sum(one.tokens for one in requests) > policy.move_tokens or not rooms.enough_without(room, starting):
            continue
        placed = rooms.place(requests, room, starting)
        if placed is not None:
            moves += [Move(request, room.replica.id, target) for request, target in placed]
    return moves


class _Room:
    """A replica and what it will hold."""

    __slots__ = ("adapters", "blocks", "given", "gone", "limits", "ranks", "replica", "size")

    def __init__(self, replica: Replica, limits: Limits) -> None:
        self.replica = replica
        self.limits = replica.limits or limits
        self.size = replica.working_set
        self.blocks = replica.free_blocks
        self.ranks = replica.ranks
        self.adapters: frozenset[int] = frozenset()
        self.given = False
        self.gone = False

    def uses(self, adapter: int) -> bool:
        return adapter in self.adapters or self.replica.uses(adapter)


class _Rooms:
    """All replicas during a consolidation, by size."""

    def __init__(self, replicas: Iterable[Replica], limits: Limits, policy: Policy) -> None:
        self._policy = policy
        self.all = [_Room(replica, limits) for replica in replicas]
        self._by_size: list[list[_Room]] = [
            [] for _ in range(max((room.limits.batch for room in self.all), default=0) + 1)
        ]
        for room in sorted(self.all, key=lambda room: room.replica.id):
            self._by_size[room.size].append(room)

    def enough_without(self, room: _Room, starting: int) -> bool:
        """Whether so much headroom is there that a replica which is emptied can be released."""
        others = [other for other in self.all if not other.gone and other is not room]
        left = len(others)
        wanted = max(self._policy.headroom, math.ceil(self._policy.headroom_share * (left + starting)))
        light = sum(map(self._is_light, others))
        free = sum(other.limits.batch - other.size for other in others)
        if free < self._policy.spare + (0 if room.gone else room.size):
            return False
        return left >= self._policy.least and light + starting >= wanted

    def _is_light(self, room: _Room) -> bool:
        share = self._policy.light
        return room.size <= share * room.limits.batch and room.blocks >= (1 - share) * room.limits.blocks

    def place(self, requests: Sequence[Request], source: _Room, starting: int) -> list[tuple[Request, int]] | None:
        """A place for every request of a replica, each on the fullest one that has room.

        Returns:
            Each request and where it goes, and the source is empty then; or None if one finds no place or the headroom
            is gone, and nothing has changed.
        """
        self._by_size[source.size].remove(source)
        placed = []
        undo: list[tuple[_Room, int, int, int, frozenset[int], bool]] = []
        for request in sorted(requests, key=lambda one: (-one.tokens, one.key)):
            room = self._find(request, source.size)
            if room is None:
                break
            undo.append((room, room.size, room.blocks, room.ranks, room.adapters, room.given))
            self._put(request, room)
            placed.append((request, room.replica.id))
        source.gone = True
        if len(placed) == len(requests) and self.enough_without(source, starting):
            return placed
        source.gone = False
        for room, size, blocks, ranks, adapters, given in reversed(undo):
            self._by_size[room.size].remove(room)
            room.size, room.blocks, room.ranks, room.adapters, room.given = size, blocks, ranks, adapters, given
            self._by_size[room.size].append(room)
        self._by_size[source.size].append(source)
        return None

    def _find(self, request: Request, least: int) -> _Room | None:
        budget = self._policy.rank_budget
        for size in range(len(self._by_size) - 2, max(least, 1) - 1, -1):
            for room in reversed(self._by_size[size]):
                if size >= room.limits.batch or room.blocks < room.limits.blocks_of(request.tokens) + size + 1:
                    continue
                if budget is None or room.uses(request.adapter) or room.ranks + request.rank <= budget:
                    return room
        return None

    def _put(self, request: Request, room: _Room) -> None:
        self._by_size[room.size].remove(room)
        if not room.uses(request.adapter):
            room.ranks += request.rank
            room.adapters |= {request.adapter}
        room.size += 1
        room.blocks -= room.limits.blocks_of(request.tokens)
        room.given = True
        self._by_size[room.size].append(room)
