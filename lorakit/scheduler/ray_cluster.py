"""Replicas on Ray: engines are actors behind Ray Serve, whose request router asks the cluster's policy.

    server ── Cluster ── RayLinks ── DeploymentHandle ── PolicyRouter ──▶ _Replica (Serve) ──▶ EngineActor
                             ├───────────────────── news, beats, cancels ────────────────────────▲
                             └── _Seat: scales, kills, deletes      _Shelf ── object store ──────┘

Serve places replicas, watches over them, begins new ones in the place of dead ones, and lets those end that are too
many. A sequence goes through Serve's handle; its router lets the policy choose (`Call`). What concerns one replica,
whether it takes requests or is about to end, goes straight to its engine's actor: its news come as one stream for all
of its sequences, one item a forward.

Which server leads, the seat tells, an actor that outlives servers. How many replicas there are is changed through it,
and what one replica is asked for names the server's term: what a superseded server asks for is not done.

An adapter's bytes are put into Ray's object store once, by the shelf, and come to each node once, where all replicas
read them from shared memory.

The only file that imports Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pickle
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lorakit.errors import ConfigError, EngineError, MissingDependencyError

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError, RayError, RayTaskError
    from ray.serve.config import DeploymentID, RequestRouterConfig
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
    from ray.util.placement_group import get_current_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
except ImportError as error:
    raise MissingDependencyError(f"several replicas need Ray ({error}): pip install lorakit[ray].") from error

# Those of Serve's processes that only pass things on need no torch, which takes seconds and half a gigabyte: what they
# pass on is pickled, and they do not look into it.
if TYPE_CHECKING:
    from lorakit.engine.engine import Engine
    from lorakit.scheduler.links import Choose
    from lorakit.scheduler.messages import Given, Hello, Known, News

Make: TypeAlias = Callable[[], "Engine"]
"""Makes a replica's engine, which has not been started; pickled, and called in its process."""

_NOTHING = "nothing"
_DEPLOYMENT = "engines"
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
_NICENESS = "RAY_worker_niceness"
_ONGOING = 100_000  # calls under way through Serve; the policy knows what a replica holds
_LONGEST_DRAIN = 3600.0  # seconds for which Serve waits for one that is to end
_LONGEST_DELETION = 60.0  # seconds for which replicas that are being deleted are waited for
_SHELF_BYTES = 8 << 30


@dataclass(frozen=True)
class RaySettings:
    """Where replicas run, and what each takes.

    Attributes:
        gpus: of a replica; more than one: they share the base by tensor parallelism. None: one, if there are any.
        cpus: of a replica.
        lease: seconds without a word of the server after which replicas drop its requests, and another may lead.
        shelf: bytes of adapters that are kept in the object store for replicas to come.
    """

    gpus: int | None = None
    cpus: float = 1.0
    lease: float = 10.0
    shelf: int = _SHELF_BYTES

    def __post_init__(self) -> None:
        if self.gpus is not None and (type(self.gpus) is not int or self.gpus < 0):
            raise ConfigError(f"a replica's gpus are {self.gpus!r}; give a whole number.")
        if not self.cpus >= 0:
            raise ConfigError(f"a replica's cpus are {self.cpus!r}; give 0 or more.")


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Has this process be part of a Ray cluster.

    In the main thread, and before it is told what to do with signals: Ray sets handlers of its own.

    Args:
        address: the cluster's; None: RAY_ADDRESS's, or one on this machine that ends with the process.

    Raises:
        EngineError: there is no such cluster, or none can begin on this machine.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": address}
    if address is None:
        own = {"address": "local", "include_dashboard": False}
        if _NICENESS not in os.environ:
            # Ray's processes give way to all others by default; but these are the server's engines.
            own["_system_config"] = {"worker_niceness": 0}
    try:
        _reach(address)
        ray.init(**own, log_to_driver=False, logging_level="warning")
    except Exception as error:
        what = "Ray does not start on this machine" if address is None else f"no Ray cluster answers at {address}"
        raise EngineError(f"{what}: {error}") from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Fails where nobody listens: Ray itself would go on trying for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class Call:
    """What is asked of a replica through Serve. Who it is asked of is decided when it is sent, by `choose`.

    A replica gets it without `choose`, which stays in this process.
    """

    def __init__(self, what: str, args: tuple[Any, ...] = (), choose: Choose | None = None) -> None:
        """Asks for something.

        Args:
            what: one of `_Replica`'s.
            args: for that.
            choose: the replicas that serve → one of them, or None for nobody.
        """
        self.what = what
        self.args = args
        self.choose = choose
        self.failure: BaseException | None = None

    @property
    def was_sent(self) -> bool:
        """Whether somebody was chosen to do it."""
        return self.what != _NOTHING

    def call_off(self, failure: BaseException | None = None) -> None:
        """Nobody is to do it: it becomes a call to nothing, as Serve goes on choosing until a call is sent."""
        self.what, self.args, self.failure = _NOTHING, (), failure

    def __reduce__(self) -> tuple[type[Call], tuple[Any, ...]]:
        return Call, (self.what, self.args)


class PolicyRouter(RequestRouter):
    """Serve's request router: each call brings along who decides where it goes, which is the cluster's policy.

    A call waits in the cluster's queue and not here, where only those come that have a place.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica that the policy names."""
        # Serve pickles this class with its module, so that in a process which it comes to `Call` is not ours.
        call: Any = None if pending_request is None else pending_request.args[0]
        if getattr(call, "choose", None) is None:
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        try:
            chosen = await call.choose(frozenset(by_name))
            if chosen in by_name:
                return [[by_name[chosen]]]
            call.call_off()
        except Exception as error:  # noqa: BLE001 - told to who has asked
            call.call_off(error)
        return [candidate_replicas]


class EngineActor:
    """An engine in a process of its own; or one of several that share a base, of which the first is asked."""

    def __init__(self, make: bytes, lease: float, rank: int, world: int, address: tuple[str, int] | None) -> None:
        """Begins to serve: of several, when all have come.

        Args:
            make: makes the engine, pickled.
            lease: see `RaySettings`.
            rank: which of the processes this is.
            world: how many share the base.
            address: host and port at which they meet, if they are several.
        """
        if address is not None:
            shared = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": address[0], "MASTER_PORT": address[1]}
            # Ray shows each process its own GPU alone.
            os.environ.update({name: str(value) for name, value in (shared | {"LOCAL_RANK": 0}).items()})
        from lorakit.scheduler.worker import Worker

        self._shelf: Any = None
        self._others: list[Any] = []
        self._left = asyncio.Event()
        self._turn = asyncio.Lock()  # what is told of adapters is done in its order
        self.worker = Worker(pickle.loads(make)().start(), self._fetch, lease=lease)

    async def ready(self) -> None:
        """It serves.

        Raises:
            EngineError: its engine is down, and will not come back.
        """
        if self.worker.engine.state == "dead":
            raise EngineError("the replica's engine is down.")

    async def join(self, others: list[Any]) -> None:
        """Is asked for what these know, too."""
        self._others = others

    async def meet(self, term: int, shelf: Any) -> bytes:
        """See `Worker.hello`, which is pickled; adapters come from the shelf."""
        hello = await asyncio.to_thread(self.worker.hello, term)
        self._left.set()  # a cluster before this one may not have listened to the end
        self._shelf, self._left = shelf, asyncio.Event()
        for other in self._others:
            await other.meet.remote(term, shelf)
        return pickle.dumps(hello)

    async def know(self, term: int, adapters: Sequence[Known]) -> None:
        """See `Worker.know`."""
        async with self._turn:
            self.worker.check(term)
            for other in self._others:
                await other.know.remote(term, adapters)
            await asyncio.to_thread(self.worker.know, term, adapters)

    async def forget(self, term: int, names: Sequence[str]) -> None:
        """See `Worker.forget`."""
        async with self._turn:
            await asyncio.to_thread(self.worker.forget, term, names)

    async def unpin(self, term: int, name: str) -> None:
        """See `Worker.unpin`."""
        async with self._turn:
            await asyncio.to_thread(self.worker.unpin, term, name)

    async def take(self, term: int, given: bytes) -> None:
        """See `Worker.take`."""
        await asyncio.to_thread(self.worker.take, term, pickle.loads(given))

    async def cancel(self, term: int, tickets: Collection[int]) -> None:
        """See `Worker.cancel`."""
        self.worker.cancel(term, tickets)

    async def beat(self, term: int) -> Any:
        """See `Worker.beat` and `Worker.stats`."""
        self.worker.beat(term)  # at once, however long the threads have other work
        return await asyncio.to_thread(self.worker.stats)

    async def news(self, term: int) -> AsyncIterator[News]:
        """See `Worker.news`; when they end, so does the replica's stay."""
        left = self._left
        try:
            async for news in self.worker.news(term):
                yield news
        finally:
            left.set()

    async def stay(self, term: int) -> None:
        """Returns when the cluster lets the replica go, or is gone: until then Serve does not end it."""
        self.worker.check(term)
        await self._left.wait()

    async def let_go(self, term: int) -> None:
        """The replica may end."""
        self.worker.check(term)
        self._left.set()

    def _fetch(self, key: str) -> Any:
        try:
            (reference,) = ray.get(self._shelf.get.remote(key))
            return ray.get(reference)
        except RayTaskError as error:
            raise _cause(error) from None


class _Seat:
    """The seat as an actor that outlives servers, and what only who leads may do. One call at a time."""

    def __init__(self, app: str, lease: float) -> None:
        from lorakit.scheduler.seat import Seat

        self._app = app
        self._seat = Seat(lease, taken=ray.get_runtime_context().was_current_actor_reconstructed)

    def take(self) -> int:
        """See `Seat.take`."""
        return self._seat.take()

    def check(self, term: int) -> None:
        """See `Seat.check`."""
        self._seat.check(term)

    def scale(self, term: int, count: int) -> None:
        """Has Serve have so many replicas."""
        self._seat.check(term)
        # What Serve's own interface for scaling from outside calls.
        controller = ray.get_actor(_CONTROLLER, namespace="serve")
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(_DEPLOYMENT, self._app), count))

    def kill(self, term: int, engine: Any) -> None:
        """Ends an engine's process."""
        self._seat.check(term)
        ray.kill(engine)

    def leave(self, term: int) -> None:
        """Deletes the replicas, and ends."""
        self._seat.check(term)
        with suppress(RuntimeError, TimeoutError):
            serve.delete(self._app)
        ray.actor.exit_actor()


class _Shelf:
    """The shelf as an actor on the server's machine: puts what is asked for into the object store, and keeps some."""

    def __init__(self, folders: list[Path], limit: int) -> None:
        from lorakit.scheduler.shelf import Shelf

        self._shelf = Shelf(folders)
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str) -> list[Any]:
        """The reference to an adapter's bytes; in a list, so that it comes as a reference."""
        with self._lock:
            if key not in self._kept:
                found = self._shelf.read(key)
                self._kept[key] = ray.put(found), found.nbytes
            self._kept.move_to_end(key)
            reference = self._kept[key][0]
            while len(self._kept) > 1 and sum(nbytes for _, nbytes in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)
        return [reference]


class _Replica:
    """A replica as Serve sees it: it has the engine's processes, and passes on what comes through Serve."""

    async def __init__(self, make: bytes, settings: RaySettings, gpus: int) -> None:  # type: ignore[misc]
        world = max(1, gpus)
        group = get_current_placement_group()
        strategy = None if group is None else PlacementGroupSchedulingStrategy(group)
        options = {
            "num_gpus": min(1, gpus),
            "num_cpus": settings.cpus / world,
            "scheduling_strategy": strategy or "DEFAULT",
        }
        address = (ray.util.get_node_ip_address(), _free_port()) if world > 1 else None
        actor = ray.remote(EngineActor).options(**options)
        engines = [actor.remote(make, settings.lease, rank, world, address) for rank in range(world)]
        await asyncio.gather(*(engine.ready.remote() for engine in engines))
        await engines[0].join.remote(engines[1:])
        self._engines = engines

    async def ask(self, call: Call) -> Any:
        """Does what a call says."""
        engine = self._engines[0]
        if call.what == _NOTHING:
            return None
        if call.what == "meet":
            return engine, await engine.meet.remote(*call.args)
        assert call.what in ("take", "stay")
        return await getattr(engine, call.what).remote(*call.args)

    async def check_health(self) -> None:
        """Its processes are there, and answer."""
        await asyncio.gather(*(engine.ready.remote() for engine in self._engines))


class RayLink:
    """One replica. See `Link`."""

    def __init__(self, engine: Any, seat: Callable[[], Any], term: int, stay: asyncio.Task[None]) -> None:
        """Reaches an engine's actor, for the server of a term. The seat may be another one by and by."""
        self._engine = engine
        self._seat = seat
        self._term = term
        self._stay = stay  # Serve ends the replica when it ends

    async def know(self, adapters: Sequence[Known]) -> None:
        """See `Link`."""
        await _answer(self._engine.know.remote(self._term, list(adapters)))

    async def forget(self, names: Sequence[str]) -> None:
        """See `Link`."""
        await _answer(self._engine.forget.remote(self._term, list(names)))

    async def unpin(self, name: str) -> None:
        """See `Link`."""
        await _answer(self._engine.unpin.remote(self._term, name))

    async def cancel(self, tickets: Collection[int]) -> None:
        """See `Link`."""
        await _answer(self._engine.cancel.remote(self._term, list(tickets)))

    async def beat(self) -> Any:
        """See `Link`."""
        return await _answer(self._engine.beat.remote(self._term))

    async def news(self) -> AsyncIterator[News]:
        """See `Link`."""
        try:
            async for reference in self._engine.news.remote(self._term):
                yield await reference
        except RayTaskError as error:
            raise _cause(error) from None

    async def let_go(self) -> None:
        """See `Link`."""
        await _answer(self._engine.let_go.remote(self._term))

    def kill(self) -> None:
        """See `Link`."""
        with suppress(Exception):
            self._seat().kill.remote(self._term, self._engine)


class RayLinks:
    """All replicas. See `Links`."""

    def __init__(self, make: Make, folders: Sequence[Path], settings: RaySettings | None = None) -> None:
        """Begins nothing yet. This process has to be `connected` when it does.

        Args:
            make: makes a replica's engine.
            folders: of the banks in which adapters lie, or will.
            settings: where replicas run.
        """
        self._make = pickle.dumps(make)
        self._folders = [folder.resolve() for folder in folders]
        self._settings = settings or RaySettings()
        self._term = 0  # none yet
        # Servers that want the same share the name, so that one that begins anew finds what the last one has left.
        self.app = "lorakit-" + hashlib.blake2b(pickle.dumps((self._make, self._settings)), digest_size=6).hexdigest()
        self._handle: Any = None
        self._seat: Any = None
        self._shelf: Any = None

    async def lead(self) -> None:
        """See `Links`."""
        for again in (True, False):
            if self._seat is None:
                self._seat = await asyncio.to_thread(self._sit)
            try:
                if self._term:
                    await _answer(self._seat.check.remote(self._term))
                else:
                    self._term = await _answer(self._seat.take.remote())
                return
            except RayActorError:  # a server that ended took it along
                self._seat = None
                if not again:
                    raise

    def _sit(self) -> Any:
        seat = ray.remote(_Seat).options(
            name=self.app,
            namespace="lorakit",
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
        )
        return seat.remote(self.app, self._settings.lease)

    async def open(self, count: int) -> None:
        """See `Links`; goes on with replicas that a server before this one has left."""
        await asyncio.to_thread(self._open, count)

    def _open(self, count: int) -> None:
        settings = self._settings
        serve.start(proxy_location="Disabled")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        shelf = ray.remote(_Shelf).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_concurrency=4)
        store = int(ray.cluster_resources().get("object_store_memory", 0))
        # The rest is for what is on its way; what does not fit Ray writes to the disk.
        self._shelf = shelf.remote(self._folders, min(settings.shelf, store // 2) if store else settings.shelf)
        if self._find():
            self._handle = serve.get_app_handle(self.app)
            return
        gpus = settings.gpus
        if gpus is None:
            gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
        deployment = serve.deployment(_Replica).options(
            name=_DEPLOYMENT,
            num_replicas=1,  # the cluster asks for the others when one has come
            max_ongoing_requests=_ONGOING,
            ray_actor_options={"num_cpus": 0},
            placement_group_bundles=[{"CPU": settings.cpus, "GPU": gpus}],
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=_LONGEST_DRAIN,
            graceful_shutdown_wait_loop_s=0.5,
            request_router_config=RequestRouterConfig(request_router_class=PolicyRouter),
        )
        ray.get(self._seat.check.remote(self._term))  # time has passed
        try:
            made = deployment.bind(self._make, settings, gpus)
            self._handle = serve.run(made, name=self.app, route_prefix=None, external_scaler_enabled=True)
        except RuntimeError as error:
            raise EngineError(f"no replica could begin: {error}") from error

    def _find(self) -> bool:
        """Whether the replicas are there already; those that are about to go are waited for."""
        end = time.monotonic() + _LONGEST_DELETION
        while True:
            found = serve.status().applications.get(self.app)
            if found is None or found.status in ("DEPLOY_FAILED", "NOT_STARTED") or time.monotonic() > end:
                return False
            if found.status != "DELETING":
                return True
            time.sleep(0.5)

    async def ids(self, seen: Callable[[frozenset[str]], None]) -> None:
        """See `Links`."""

        async def look(names: frozenset[str]) -> str | None:
            seen(names)
            return None

        await self._ask(Call(_NOTHING, (), look))

    async def meet(self, id: str) -> tuple[RayLink, Hello]:
        """See `Links`."""

        async def this(names: frozenset[str]) -> str | None:
            return id if id in names else None

        call = Call("meet", (self._term, self._shelf), this)
        found = await self._ask(call)
        if not call.was_sent:
            raise EngineError(f"replica {id} is gone.")
        engine, hello = found[0], pickle.loads(found[1])
        stay = asyncio.ensure_future(self._stay(Call("stay", (self._term,), this)))
        return RayLink(engine, lambda: self._seat, self._term, stay), hello

    async def _stay(self, call: Call) -> None:
        with suppress(Exception):
            await self._ask(call)

    async def give(self, given: Given, choose: Choose) -> bool:
        """See `Links`."""
        call = Call("take", (self._term, pickle.dumps(given)), choose)
        await self._ask(call)
        return call.was_sent

    async def _ask(self, call: Call) -> Any:
        answer = await _answer(self._handle.ask.remote(call))
        if call.failure is not None:
            raise call.failure
        return answer

    async def scale(self, count: int) -> None:
        """See `Links`."""
        await _answer(self._seat.scale.remote(self._term, count))

    async def close(self) -> None:
        """See `Links`."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        if self._term:
            with suppress(RayError):  # it is gone then, or another server's
                ray.get(self._seat.leave.remote(self._term))
        if self._shelf is not None:
            with suppress(RayError, ValueError):
                ray.kill(self._shelf)


async def _answer(asked: Any) -> Any:
    """What an actor says, or raises."""
    try:
        return await asked
    except RayTaskError as error:
        raise _cause(error) from None


def _cause(error: BaseException) -> BaseException:
    """What was raised in the other process."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        port: int = one.getsockname()[1]
    return port
