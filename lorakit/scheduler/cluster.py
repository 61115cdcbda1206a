"""Many engines as one: requests go to the replica that the policy names, wait, move, and survive the replicas' ends.

    with Cluster(links, catalog, config, policy) as cluster:
        handle = cluster.submit(prompt_ids, adapter_id="sql", max_new_tokens=64)
        for token in handle: ...

To callers it is an `Engine`. What happens to a request, `dispatcher.py` decides. Knows token ids and adapters' names;
what carries the messages, `links.py` tells.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from lorakit.engine.checks import shown
from lorakit.engine.engine import DEFAULTS
from lorakit.engine.handle import RequestHandle
from lorakit.engine.intake import Intake
from lorakit.engine.rate import Rate
from lorakit.engine.request import Request
from lorakit.engine.stats import EngineState, EngineStats, Ledger, Tier
from lorakit.engine.stopping import Decode
from lorakit.engine.tenants import TenantPolicy, Tenants
from lorakit.errors import ConfigError, EngineBusyError, EngineStoppedError, RequestError, SupersededError
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.dispatcher import Dispatcher
from lorakit.scheduler.flight import Flight
from lorakit.scheduler.links import Links
from lorakit.scheduler.policy import Policy
from lorakit.scheduler.sample import Sample
from lorakit.scheduler.snapshot import Limits

_log = logging.getLogger(__name__)


class Cluster:
    """Serves requests on many engines until it is closed. All methods may be called from any thread.

    Attributes:
        model: the adapters, by the methods that a model has for them.
        config: the settings.
    """

    def __init__(
        self,
        links: Links,
        catalog: Catalog,
        base: Any,
        policy: Policy | None = None,
        config: ClusterConfig | None = None,
        *,
        generation_config: Any = None,
        decode: Decode | None = None,
        on_end: Callable[[RequestHandle], None] | None = None,
    ) -> None:
        """Takes nothing yet; `start`, or a `with` block, does.

        Args:
            links: reach the replicas.
            catalog: the adapters.
            base: the base's config.
            policy: which replica, and how many.
            config: the settings.
            generation_config: the base's; its end-of-sequence tokens end a request. None: those of its config.
            decode: token ids → their text, for stop strings; replicas have one of their own.
            on_end: called once with every request that has ended, however it did.
        """
        self.model = catalog
        self.config = config or ClusterConfig()
        self._tenants = Tenants(self.config.tenants, self.config.default_tenant)
        self._dispatcher = Dispatcher(links, catalog, policy or Policy(), self.config, self._tenants)
        self._on_end = on_end
        self._intake = Intake(base, generation_config or base, catalog, lambda: self.capacity, decode)
        self._requests = Ledger()
        self._done = Rate()
        self._state: EngineState = "new"
        self._lock = threading.RLock()
        self._names = itertools.count()
        self._keys = itertools.count()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def state(self) -> EngineState:
        """Whether it serves: "ready"; "restarting" while no replica is there; "dead" when another server leads."""
        if self._state == "ready" and self._dispatcher.superseded is not None:
            return "dead"
        if self._state == "ready" and not self._dispatcher.replicas:
            return "restarting"
        return self._state

    @property
    def capacity(self) -> int:
        """The most tokens that one sequence may have, its prompt included, on the largest replica."""
        self._check_running()
        return self._dispatcher.capacity

    @property
    def limits(self) -> Limits:
        """What each replica holds."""
        self._check_running()
        return self._dispatcher.limits

    def start(self) -> Self:
        """Has the first replicas begin, and serves when one of them does.

        Raises:
            EngineStoppedError: it was started before; make a new one.
            EngineError: no replica could begin, or came in time.
            EngineBusyError: another server uses the replicas.
        """
        with self._lock:
            if self._state != "new":
                raise EngineStoppedError(f"the cluster is {self._state}; a cluster is started once, make a new one.")
            self._state = "restarting"
        try:
            self._dispatcher.start()
        except BaseException:
            self.close()
            raise
        with self._lock:
            self._state = "ready"
        return self

    def close(self) -> None:
        """Ends all replicas; requests still open fail. To let them end first, `drain`."""
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closed"
        for handle in self._requests.handles:
            handle.fail(EngineStoppedError("the cluster was closed before the request was done; start another one."))
        self._dispatcher.close()
        self.model.close()

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until no request is open.

        Args:
            timeout: seconds, or None for as long as it takes.

        Returns:
            Whether none is.
        """
        return self._requests.drain(timeout)

    def submit(self, prompt: Sequence[int], adapter_id: str | None = None, **settings: Any) -> RequestHandle:
        """Queues a request, and returns at once; arguments and errors as `Engine.submit` has them."""
        self._check_running()
        unknown = settings.keys() - DEFAULTS.keys()
        if unknown:
            raise TypeError(f"submit() got an unexpected keyword argument {min(unknown)!r}")
        request = self._intake.request(prompt, adapter_id, **{**DEFAULTS, **settings})
        most = self._tenants.policy(request.tenant).max_waiting
        for what, limit in (("the cluster's", self.config.max_waiting), (f"tenant {request.tenant!r}'s", most)):
            if limit is not None and request.n > limit:
                raise RequestError(
                    f"n={request.n} sequences wait at once, and {what} max_waiting is {limit}; draw fewer, or raise it."
                )
        with self._lock:
            self._check_running()
            self._check_room(request)
            handle = RequestHandle(f"request-{next(self._names)}", request, self._cancel, self._ended)
            flights = [Flight(next(self._keys), handle, sequence) for sequence in range(request.n)]
            handle.parts += flights
            self._requests.open(handle)
            self._dispatcher.arrive(handle, flights)
        return handle

    def set_tenant(self, name: str, policy: TenantPolicy) -> None:
        """Gives a tenant another policy; what waits already keeps its place.

        Raises:
            ConfigError: it is none.
        """
        if not isinstance(name, str) or not isinstance(policy, TenantPolicy):
            raise ConfigError(f"{shown(policy)} for tenant {shown(name)}; give a TenantPolicy for a name.")
        self._tenants.change(name, policy)

    def stats(self) -> EngineStats:
        """What all replicas are doing, as they told last."""
        replicas = self._dispatcher.replicas
        told, totals = [replica.stats for replica in replicas], self._dispatcher.totals
        free = sum(max(0, replica.told) * replica.limits.block_tokens for replica in replicas)
        tokens = sum(replica.limits.blocks * replica.limits.block_tokens for replica in replicas)
        return EngineStats(
            state=self.state,
            open=len(self._requests),
            running=self._requests.running(),
            waiting=self._requests.waiting(),
            device=_sum_of_tiers(one.device for one in told),
            host=_sum_of_tiers(one.host for one in told),
            loads=totals.loads,
            cache_free=min(1.0, free / tokens) if tokens else 1.0,
            steps=totals.steps,
            segments=totals.segments,
            tenants=self._requests.tenants(),
            replicas=len(replicas),
        )

    def sample(self, since: float = 0.0) -> Sample:
        """The replicas now, as a simulation samples them.

        Args:
            since: from when on its seconds are counted, by `time.monotonic`.
        """
        return self._dispatcher.sample(since)

    def _check_running(self) -> None:
        if self._state == "ready" and self._dispatcher.superseded is not None:
            raise SupersededError(*self._dispatcher.superseded.args)
        if self._state != "ready":
            remedy = "call start(), or use it in a with block" if self._state == "new" else "make a new one"
            raise EngineStoppedError(f"the cluster does not run; {remedy}.")

    def _check_room(self, request: Request) -> None:
        over = self._tenants.waiting + request.n > self.config.max_waiting
        if over or not self._tenants.may_wait(request.tenant, request.n):
            whose = "the cluster" if over else f"tenant {request.tenant!r}"
            seconds = self._done.seconds_for(request.n)
            raise EngineBusyError(
                f"{whose} has as many sequences waiting as it may; try again in {seconds:.0f} s.", retry_after=seconds
            )

    def _cancel(self, handle: RequestHandle) -> None:
        """Nobody wants a request any more: its readers know at once."""
        for sequence, part in enumerate(handle.parts):
            handle.finish(sequence, "cancelled", cached=part.cached, joined=part.joined)
        self._dispatcher.withdraw(handle)

    def _ended(self, handle: RequestHandle) -> None:
        self._requests.close(handle)
        self._done.count(handle.request.n)
        if self._on_end is not None:
            try:
                self._on_end(handle)
            except Exception:  # noqa: BLE001 - the caller's, and no reason for the loop to fail
                _log.exception("on_end failed for %s", handle.id)


def _sum_of_tiers(tiers: Iterable[Tier]) -> Tier:
    found = list(tiers)
    limits = [tier.limit for tier in found]
    known = [limit for limit in limits if limit is not None]
    return Tier(
        sum(tier.adapters for tier in found),
        sum(tier.nbytes for tier in found),
        sum(known) if known and len(known) == len(limits) else None,
    )
