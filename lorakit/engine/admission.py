"""Admission: which waiting jobs may join the batch, in which order, and with their adapters on the device.

Jobs are chosen by deficit round robin and keep that order. One whose adapter is on its way lets others pass; one whose
adapter finds no room, as running jobs hold all of it, lets others pass for a while only: then nothing new is admitted
until there is room, so no popular adapter keeps a rare one out forever.

Runs in the engine's thread. Knows jobs, adapters and slots; nothing of transformers.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Hashable, Iterator

from lorakit.engine.fairness import FairQueue
from lorakit.engine.job import Job
from lorakit.engine.request import check_added
from lorakit.engine.residency import Residency
from lorakit.engine.tenants import Tenants
from lorakit.errors import DeadlineExceededError
from lorakit.runtime.model import MultiLoraModel
from lorakit.runtime.pool import Slot

LOOKAHEAD = 8
"""Jobs chosen beyond those that may join now: their adapters are read ahead."""

_MOST_STALLED = 64
"""Jobs whose adapters are awaited at the same time: each is looked at in every step."""

_MOST_DEADLINES = 64
"""Deadlines of jobs that have ended which are kept anyway."""


class Admission:
    """The jobs of an engine, waiting, chosen and running."""

    def __init__(
        self, model: MultiLoraModel, residency: Residency, tenants: Tenants, *, quantum: int, patience: float
    ) -> None:
        """Has no job yet.

        Args:
            model: whose adapters they name.
            residency: brings these to the device.
            tenants: counts, weights and caps.
            quantum: tokens of a turn, see `FairQueue`.
            patience: seconds for which jobs may pass one whose adapter finds no room.
        """
        self._model = model
        self._vocabulary: int = model.config.get_text_config().vocab_size
        self._residency = residency
        self._tenants = tenants
        self._queue = FairQueue(quantum)
        self._patience = patience
        self._waiting: dict[str, Job] = {}
        self._taken: dict[str, Job] = {}
        self._chosen: dict[str, Job] = {}
        self._resumed: dict[str, Job] = {}
        self._deadlines: list[tuple[float, str, Job]] = []
        self._failed: list[Job] = []
        self._fresh: list[Slot] = []
        self._blocked: tuple[Job, float] | None = None
        self._stalled: set[str] = set()

    def wait(self, job: Job) -> None:
        """A job waits: a new one for its turn, one that had to leave the batch before all others."""
        if job.id in self._taken:
            self._resumed[job.id] = job
            return
        self._waiting[job.id] = job
        tenant = job.request.tenant
        self._queue.add(job.id, tenant, job.cost, self._tenants.policy(tenant).weight)
        if job.deadline is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.id, job))

    def overdue(self) -> Iterator[Job]:
        """Fails the jobs whose deadlines have passed, and gives them."""
        if len(self._deadlines) > _MOST_DEADLINES + 2 * (len(self._waiting) + len(self._taken)):
            self._deadlines = [entry for entry in self._deadlines if not entry[2].over]
            heapq.heapify(self._deadlines)
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, job = heapq.heappop(self._deadlines)
            if job.over:
                continue
            job.fail(
                DeadlineExceededError(
                    f"request {job.handle.id} was not done {job.request.deadline} s after its submission; it has "
                    f"{len(job.generated)} of up to {job.request.max_new_tokens} tokens. Give it more time, or a "
                    "less busy engine."
                )
            )
            yield job

    def candidates(self, places: int, *, idle: bool) -> Iterator[Job]:
        """The jobs that may join the batch now, bound to their slots, in order.

        Args:
            places: how many may.
            idle: nothing runs, so that an adapter's copy may be waited for.
        """
        for job in [job for job in self._resumed.values() if not job.over][: max(0, places)]:
            places -= 1
            yield job
        self._choose(places + LOOKAHEAD)
        self._stalled = set()
        passable = True
        for job in list(self._chosen.values()):
            if job.over:
                continue
            if job.handle.done:  # it failed with another of its request's sequences
                self._give_up(job)
                continue
            if job.bound or (places > 0 and passable and self._bind(job, patient=not idle)):
                places -= 1
                yield job
            elif places <= 0:
                self._read_ahead(job)
            elif passable and not job.over:
                assert job.adapter is not None
                self._stalled.add(job.adapter)
                if self._residency.full:
                    passable = self._may_be_passed(job)

    def admitted(self, running: Collection[str]) -> None:
        """Tells which jobs run now."""
        for waiting in (self._chosen, self._resumed):
            for key in [key for key in waiting if key in running]:
                job = waiting.pop(key)
                if job.joined is None:
                    job.joined = time.monotonic()

    def fresh(self) -> list[Slot]:
        """Slots that were bound since the last call: the stream that computes has to wait for them once."""
        fresh, self._fresh = self._fresh, []
        return [slot for slot in fresh if slot.resident]  # its job may have ended before any batch

    def failed(self) -> list[Job]:
        """The jobs that failed since the last call because of their adapters."""
        failed, self._failed = self._failed, []
        return failed

    def forget(self, job: Job) -> None:
        """A job that waited, or was about to, will not run."""
        if job.id not in self._taken:
            self._queue.remove(job.id)
            self._waiting.pop(job.id, None)
            self._tenants.count(job.request.tenant, waiting=-1)

    def let_go(self, live: Callable[[str], bool]) -> None:
        """Lets go of what is held for jobs that were chosen and neither wait nor run any more.

        A job that is over may still be in the batch: its slot is held until it has left.
        """
        gone = [job for key, job in self._taken.items() if not live(key)]
        for job in gone:
            del self._taken[job.id]
            self._chosen.pop(job.id, None)
            self._resumed.pop(job.id, None)
            self._tenants.count(job.request.tenant, running=-1)
            self._queue.refund(job.request.tenant, job.unused)
            if job.held is not None:
                self._residency.release(job.held)
                job.held = None
        self._model.forget_removed()

    def close(self) -> None:
        """Lets go of all that is held."""
        self.let_go(lambda _: False)

    def _choose(self, most: int) -> None:
        stalled = sum(job.adapter in self._stalled for job in self._chosen.values())
        if stalled > _MOST_STALLED:
            return
        while len(self._chosen) - stalled < most:
            key = self._queue.choose(self._may_be_chosen)
            if key is None:
                return
            assert isinstance(key, str)
            job = self._waiting.pop(key)
            self._chosen[key] = self._taken[key] = job
            self._tenants.count(job.request.tenant, waiting=-1, running=1)

    def _may_be_chosen(self, tenant: Hashable, key: Hashable) -> bool:
        """Whether a tenant's oldest job may be chosen; one whose adapter is awaited would only be in the way."""
        assert isinstance(key, str)
        return self._waiting[key].adapter not in self._stalled and self._tenants.may_run(tenant)

    def _bind(self, job: Job, *, patient: bool) -> bool:
        """Binds a job if its adapter is there; one whose adapter cannot be had fails."""
        if job.adapter is None:
            job.bind(None, None)
            return True
        try:
            with self._model.lock:  # so that nobody takes the adapter out in between
                adapter = self._model.adapter(job.adapter)
                # Another adapter may have come under the name, with fewer tokens.
                check_added(job.request.prompt, self._vocabulary, adapter)
                slot = self._residency.slot(adapter, patient=patient)
        # Whatever files and devices can do to a load, it fails the requests of that adapter alone.
        except Exception as error:  # noqa: BLE001
            job.fail(error)
            self._give_up(job)
            return False
        if slot is None:
            return False
        job.bind(adapter, slot)
        job.held = slot
        self._fresh.append(slot)
        return True

    def _give_up(self, job: Job) -> None:
        job.over = True
        self._failed.append(job)

    def _read_ahead(self, job: Job) -> None:
        if job.adapter is None:
            return
        try:
            adapter = self._model.adapter(job.adapter)
        except KeyError:  # it fails when it is its turn
            return
        self._residency.read_ahead(adapter)

    def _may_be_passed(self, job: Job) -> bool:
        """Whether jobs behind one that finds no room may still take what there is."""
        now = time.monotonic()
        if self._blocked is None or self._blocked[0].bound or self._blocked[0].over:
            self._blocked = job, now
        return now - self._blocked[1] < self._patience
