"""Whole schemes, to be compared on one trace: which replica, which order, how many GPUs.

    punica            Punica's policy: the largest working set, scaling and consolidation (`policy.py`)
    punica-affinity   the same, preferring a replica that holds the adapter
    punica-fair       the same as punica, in the order of deficit round robin over tenants
    ray-serve         Ray Serve's default router, `PowerOfTwoChoicesRequestRouter` with a multiplexed model an adapter
                     : two random ones of the replicas that hold the adapter, else of those with the fewest
                      adapters, else of all; of the two the one with fewer requests
    round-robin       the next replica in turn
    least-loaded      the replica with the fewest requests
    gpu-a-tenant      a replica serves one adapter at a time

All of them know the room of every replica, and send no request where it does not fit: what fits nowhere waits in one
queue. That is better than what Ray Serve and a plain round robin do. Those without a scaling of their own have
`Autoscaler`, Ray Serve's, or a fixed number of GPUs.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from lorakit.errors import ConfigError
from lorakit.scheduler.fleet import Fleet, numbers
from lorakit.scheduler.job import Job
from lorakit.scheduler.policy import Move, Policy, consolidate, fits, may_release, route, scale_up
from lorakit.scheduler.queues import FairFcfs, Fcfs, FcfsEach, Queue
from lorakit.scheduler.snapshot import Limits

Route = Callable[[Fleet, Job, int, float], int | None]
"""Fleet, request, set of replicas that come into question (-1: all), seconds → a replica, or None."""


@dataclass(frozen=True)
class Autoscaler:
    """Ray Serve's, with its defaults: as many replicas as keep the requests of each at a target on average.

    `replica_queue_length_autoscaling_policy`.

    Attributes:
        target: `target_ongoing_requests`, of a replica, running or waiting.
        look_back: seconds over which the requests are averaged, `look_back_period_s`.
        up_delay: seconds for which more replicas have to be wanted, `upscale_delay_s`.
        down_delay: seconds for which fewer have to be, `downscale_delay_s`.
        every: seconds between two looks.
    """

    target: float = 2.0
    look_back: float = 30.0
    up_delay: float = 30.0
    down_delay: float = 600.0
    every: float = 1.0

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.look_back >= 0 and self.up_delay >= 0 and self.down_delay >= 0):
            raise ConfigError(f"an autoscaler's target has to be above 0 and its delays at least 0 s: {self}.")
        if not self.every > 0:
            raise ConfigError(f"an autoscaler looks every {self.every!r} s; give more than 0.")


class Scheme(Protocol):
    """What a simulation asks.

    Attributes:
        limits: of a replica.
        initial: replicas at the beginning.
        every: seconds between two calls of `ask_regularly`; None: never.
        consolidate_every: seconds between two calls of `consolidate`; None: never.
        linger: seconds for which an empty replica stays.
    """

    limits: Limits
    initial: int
    every: float | None
    consolidate_every: float | None
    linger: float

    def queue(self) -> Queue[Job]:
        """An empty queue of its order."""
        ...

    def route(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """The replica that a request goes to, of a set (-1: of all), or None."""
        ...

    def ask(self, fleet: Fleet, starting: int, waiting: int, draining: int) -> int:
        """How many GPUs to ask for, when a request has come."""
        ...

    def ask_regularly(self, now: float, ongoing: int, replicas: int, owned: int) -> int:
        """By how many GPUs to change the fleet.

        Args:
            now: seconds.
            ongoing: requests that run or wait.
            replicas: that serve or start.
            owned: GPUs that are paid for, also for replicas that are drained.
        """
        ...

    def may_release(self, fleet: Fleet, number: int, starting: int, waiting: int) -> bool:
        """Whether an empty replica can go."""
        ...

    def consolidate(self, fleet: Fleet, starting: int) -> list[Move]:
        """Which requests to move."""
        ...


class Punica:
    """Punica's policy. See `Scheme`."""

    def __init__(self, policy: Policy, limits: Limits, queue: Callable[[], Queue[Job]] = Fcfs) -> None:
        """Decides by a policy over replicas of such limits, and has requests wait in such queues."""
        self.policy = policy
        self.limits = limits
        self.queue = queue
        self.initial = max(policy.least, 1)
        self.every: float | None = policy.look_every
        self.consolidate_every = policy.consolidate_every
        self.linger = policy.linger

    def route(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """See `policy.route`."""
        return route(fleet, job, self.limits, self.policy, among)

    def ask(self, fleet: Fleet, starting: int, waiting: int, draining: int) -> int:
        """See `policy.scale_up`."""
        return scale_up(fleet, starting, waiting, self.limits, self.policy, draining)

    def ask_regularly(self, now: float, ongoing: int, replicas: int, owned: int) -> int:
        """None: `ask` and `may_release` see to it."""
        return 0

    def may_release(self, fleet: Fleet, number: int, starting: int, waiting: int) -> bool:
        """See `policy.may_release`."""
        return may_release(fleet, number, starting, waiting, self.limits, self.policy)

    def consolidate(self, fleet: Fleet, starting: int) -> list[Move]:
        """See `policy.consolidate`."""
        return consolidate(fleet, starting, self.limits, self.policy)


class Routed:
    """A router beside Ray Serve's autoscaler, or a fixed number of GPUs. See `Scheme`."""

    consolidate_every: float | None = None
    linger = 0.0

    def __init__(
        self,
        router: Route,
        limits: Limits,
        most: int,
        autoscaler: Autoscaler | None,
        queue: Callable[[], Queue[Job]] = Fcfs,
    ) -> None:
        """Has at most so many GPUs, or with no autoscaler always so many."""
        self.limits = limits
        self.queue = queue
        self.initial = most if autoscaler is None else 1
        self.every = None if autoscaler is None else autoscaler.every
        self._router = router
        self._most = most
        self._scaler = autoscaler
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0
        self._direction = 0
        self._since = 0.0

    def route(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """The router's choice."""
        return self._router(fleet, job, among, now)

    def ask(self, fleet: Fleet, starting: int, waiting: int, draining: int) -> int:
        """Never: the autoscaler looks by itself."""
        return 0

    def ask_regularly(self, now: float, ongoing: int, replicas: int, owned: int) -> int:
        """How far the number of replicas is from the target's, once it has been so for long enough."""
        scaler = self._scaler
        if scaler is None:
            return 0
        self._seen.append((now, ongoing))
        self._sum += ongoing
        while self._seen[0][0] < now - scaler.look_back:
            self._sum -= self._seen.popleft()[1]
        # The number of replicas times the ratio of requests to the target, as Ray has it.
        wanted = math.ceil(self._sum / len(self._seen) / scaler.target)
        change = max(1, min(self._most, wanted)) - replicas
        direction = (change > 0) - (change < 0)
        if direction != self._direction:
            self._direction, self._since = direction, now
        delay = scaler.up_delay if change > 0 else scaler.down_delay
        if not change or now - self._since < delay:
            return 0
        self._since = now
        return min(change, self._most - owned)

    def may_release(self, fleet: Fleet, number: int, starting: int, waiting: int) -> bool:
        """Never: the autoscaler drains replicas."""
        return False

    def consolidate(self, fleet: Fleet, starting: int) -> list[Move]:
        """Never."""
        return []


_ANY = Policy()


class RayServe:
    """Ray Serve's default router, `request_router/pow_2_router.py` and `MultiplexMixin`.

    Ray goes on to all replicas a second after the first two sets were full, and tries again with a growing pause; here
    it goes on at once, and tries again whenever a request ends. Where just two replicas come into question and are
    equal, Ray draws; here it is the higher id.
    """

    def __init__(self, limits: Limits, seed: int) -> None:
        """Draws by a seed."""
        self._limits = limits
        self._random = random.Random(seed)

    def __call__(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """Tries the sets of replicas in Ray's order, two of each."""
        for replicas in (fleet.holders(job.adapter), self._fewest(fleet), fleet.everyone):
            found = self._of_two(fleet, replicas & among, job)
            if found is not None:
                return found
        return None

    @staticmethod
    def _fewest(fleet: Fleet) -> int:
        least, found = -1, 0
        for replica in fleet:
            if least < 0 or replica.resident < least:
                least, found = replica.resident, 0
            if replica.resident == least:
                found |= 1 << replica.id
        return found

    def _of_two(self, fleet: Fleet, replicas: int, job: Job) -> int | None:
        ids = list(numbers(replicas))
        if len(ids) > 2:
            ids = self._random.sample(ids, 2)
        ids = [number for number in ids if fits(fleet[number], job, self._limits, _ANY)]
        return min(ids, key=lambda number: fleet[number].working_set, default=None)


class RoundRobin:
    """The next replica in turn that has room."""

    def __init__(self, limits: Limits) -> None:
        """Begins with the lowest id."""
        self._limits = limits
        self._last = -1

    def __call__(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """The next one."""
        later = fleet.everyone & among & ~((1 << (self._last + 1)) - 1)
        for replicas in (later, fleet.everyone & among & ~later):
            for number in reversed(list(numbers(replicas))):
                if fits(fleet[number], job, self._limits, _ANY):
                    self._last = number
                    return number
        return None


class LeastLoaded:
    """The replica with the fewest requests."""

    def __init__(self, limits: Limits) -> None:
        """Of replicas with such limits."""
        self._limits = limits

    def __call__(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """Ties go to the highest id."""
        for _, replicas in fleet.emptiest_first():
            for number in numbers(replicas & among):
                if fits(fleet[number], job, self._limits, _ANY):
                    return number
        return None


class GpuATenant:
    """A replica that serves the adapter already, else one that serves nobody."""

    def __init__(self, limits: Limits) -> None:
        """Of replicas with such limits."""
        self._limits = limits

    def __call__(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """Ties go to the highest id."""
        idle = None
        for _, replicas in fleet.fullest_first():
            for number in numbers(replicas & among):
                replica = fleet[number]
                if replica.uses(job.adapter) and fits(replica, job, self._limits, _ANY):
                    return number
                if idle is None and not replica.working_set:
                    idle = number
        return idle


class TenantGpus(Punica):
    """A GPU a tenant: asks for one whenever a tenant has no room, and gives it back when that has no request."""

    def __init__(self, limits: Limits, most: int) -> None:
        """Has at most so many GPUs."""
        super().__init__(replace(_ANY, most=most, headroom=0, consolidate_every=None), limits, FcfsEach)
        self._router = GpuATenant(limits)

    def route(self, fleet: Fleet, job: Job, among: int, now: float) -> int | None:
        """See `GpuATenant`."""
        return self._router(fleet, job, among, now)

    def ask(self, fleet: Fleet, starting: int, waiting: int, draining: int) -> int:
        """One more for each that waits."""
        return max(0, min(waiting - starting, self.policy.most - len(fleet) - starting - draining))


SCHEMES = ("punica", "punica-affinity", "punica-fair", "ray-serve", "round-robin", "least-loaded", "gpu-a-tenant")
"""The names of the schemes."""


def make_scheme(
    name: str,
    policy: Policy,
    limits: Limits,
    autoscaler: Autoscaler | None,
    seed: int = 0,
    owners: Mapping[int, int] | None = None,
) -> Scheme:
    """A scheme by its name.

    Args:
        name: one of `SCHEMES`.
        policy: of Punica's; its `most` holds for all.
        limits: of a replica.
        autoscaler: of ray-serve, round-robin and least-loaded; None: all GPUs all the time.
        seed: of Ray Serve's draws.
        owners: adapter → tenant, for punica-fair; by default an adapter is a tenant.

    Raises:
        ConfigError: there is no such scheme.
    """
    if name == "punica":
        return Punica(policy, limits)
    if name == "punica-affinity":
        return Punica(replace(policy, affinity=True), limits)
    if name == "punica-fair":
        of = owners or {}
        return Punica(policy, limits, lambda: FairFcfs(lambda job: of.get(job.adapter, job.adapter)))
    if name == "gpu-a-tenant":
        return TenantGpus(limits, policy.most)
    routers: dict[str, Callable[[], Route]] = {
        "ray-serve": lambda: RayServe(limits, seed),
        "round-robin": lambda: RoundRobin(limits),
        "least-loaded": lambda: LeastLoaded(limits),
    }
    if name not in routers:
        raise ConfigError(f"there is no scheme {name!r}; there are {', '.join(SCHEMES)}.")
    return Routed(routers[name](), limits, policy.most, autoscaler)
