"""What the first of several processes tells the others before every step, and what they make of it.

The processes share a base (tensor parallelism) and run the same steps. Which jobs join the batch depends on time,
threads and the disk, so the first process alone decides it. The others do what they are told, in the same order: their
batches, caches and adapters' memories are like the first's to the byte, and no step waits for another's adapter.

Knows jobs, adapters and a pool; nothing of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from lorakit.engine.admission import Admission
from lorakit.engine.handle import RequestHandle
from lorakit.engine.job import Job
from lorakit.engine.request import Request
from lorakit.engine.residency import Residency
from lorakit.errors import AdapterNotFoundError, EngineError, LorakitError
from lorakit.runtime.host_cache import HostExtent
from lorakit.runtime.model import MultiLoraModel
from lorakit.runtime.pool import Operation, Slot
from lorakit.runtime.roster import Adapter


class Offer(NamedTuple):
    """A job that may join the batch.

    Attributes:
        request_id: names its request.
        request: what was asked for, without its stop strings: text is the first process's alone.
        sequence: which of the request's it is.
        serial: of the slot that acts on its tokens; None for the base.
        start: the token from which on it does.
        salt: stands for both.
    """

    request_id: str
    request: Request
    sequence: int
    serial: int | None
    start: int
    salt: tuple[int, ...] | None


class Orders(NamedTuple):
    """What happens before a step.

    Attributes:
        ended: jobs that leave the batch, or what waits to join it.
        bank_changed: whether the bank is to be read again.
        read: key → name of adapters that will be asked for.
        operations: what to do with the pool.
        offers: jobs that may join the batch, in their order.
    """

    ended: Sequence[str] = ()
    bank_changed: bool = False
    read: Mapping[str, str] = {}
    operations: Sequence[Operation] = ()
    offers: Sequence[Offer] = ()

    @property
    def size(self) -> int:
        """0 if there is nothing to tell."""
        return len(self.ended) + self.bank_changed + len(self.read) + len(self.operations) + len(self.offers)


class Leader:
    """The first process: its jobs wait here until `Admission` offers them."""

    def __init__(self, model: MultiLoraModel, residency: Residency, admission: Admission) -> None:
        """Has no job yet.

        Args:
            model: lent to the engine; its adapters leave the device, as in the other processes.
            residency: brings them there.
            admission: offers jobs.
        """
        self._model = model
        self._residency = residency
        self._admission = admission
        self._waiting: dict[str, Job] = {}
        self._offered: list[Job] = []
        self._entries = None if model.bank is None else model.bank.entries
        self._residency.begun = {}
        with model.lock:
            model.pool.begin_anew()
            model.pool.journal = []

    def fresh(self) -> list[Slot]:
        """See `Admission.fresh`."""
        return self._admission.fresh()

    def ended(self, new: Iterable[Job], withdrawn: Iterable[str], offered: Iterable[Job]) -> list[str]:
        """Takes new jobs, lets go of those that will not run, and tells which leave that were offered.

        Args:
            new: jobs that were submitted.
            withdrawn: names of jobs that nobody wants any more.
            offered: jobs in the batch, or about to join it.
        """
        for job in new:
            if job.over:
                self._admission.forget(job)
            else:
                self._waiting[job.id] = job
                self._admission.wait(job)
        failed = (*self._admission.overdue(), *self._admission.failed())
        for key in (*withdrawn, *(job.id for job in failed)):
            if key in self._waiting:
                self._admission.forget(self._waiting.pop(key))
        return [job.id for job in offered if job.over or job.handle.done]

    def orders(
        self, ended: Sequence[str], running: Mapping[str, Job], joining: Mapping[str, Job], places: int
    ) -> Orders:
        """All that the other processes are told.

        Args:
            ended: jobs that have left this process's batch.
            running: those that are in it, by their names.
            joining: those that were offered, or thrown out of a full cache, and are not.
            places: how many jobs may be in the batch.
        """
        self._admission.admitted(running)
        self._admission.let_go(lambda key: key in running or key in joining or key in self._waiting)
        places -= len(running) + sum(job.begun for job in joining.values())
        # One that was offered before is named again until it runs.
        jobs = [job for job in self._admission.candidates(places, idle=not running) if job.id in self._waiting]
        self._offered = jobs
        for job in jobs:
            del self._waiting[job.id]
        with self._model.lock:
            read, self._residency.begun = self._residency.begun or {}, {}
            operations, self._model.pool.journal = self._model.pool.journal or [], []
        return Orders(ended, self._bank_changed(), read, operations, [_offer(job) for job in jobs])

    def carry_out(self, orders: Orders) -> list[Job]:
        """The jobs that were offered; all else is done."""
        return self._offered

    def close(self) -> None:
        """Keeps no journal any more, and lets go of all that is held."""
        self._admission.close()
        self._model.pool.journal = self._residency.begun = None

    def _bank_changed(self) -> bool:
        entries = None if self._model.bank is None else self._model.bank.entries
        changed, self._entries = entries is not self._entries, entries
        return changed


class Follower:
    """Another process."""

    def __init__(self, model: MultiLoraModel, residency: Residency) -> None:
        """Has no job yet.

        Args:
            model: lent to the engine; its adapters leave the device.
            residency: reads them.
        """
        self._model = model
        self._residency = residency
        self._fresh: list[Slot] = []
        with model.lock:
            model.pool.begin_anew()

    def fresh(self) -> list[Slot]:
        """See `Admission.fresh`."""
        fresh, self._fresh = self._fresh, []
        return [slot for slot in fresh if slot.resident]

    def carry_out(self, orders: Orders) -> list[Job]:
        """Does all that the first process has done, but for ending jobs.

        Returns:
            The jobs that were offered.

        Raises:
            EngineError: this process finds another adapter under a name than the first.
            BankCorruptedError, …: an adapter cannot be read.
        """
        for key, name in orders.read.items():
            with suppress(LorakitError):  # the request of that adapter may never come
                self._residency.read_ahead(self._adapter(name, key))
        with self._model.lock:
            for operation in orders.operations:
                slot = self._model.pool.replay(operation, self._read)
                if slot is not None:
                    self._fresh.append(slot)
            jobs = [self._job(offer) for offer in orders.offers]
        # After all that was done with the bank as it was.
        if orders.bank_changed and self._model.bank is not None:
            self._model.bank.reload()
        return jobs

    def close(self) -> None:
        """Lets go of all that is held."""
        with self._model.lock:
            self._model.pool.release_all()

    def _job(self, offer: Offer) -> Job:
        job = Job(RequestHandle(offer.request_id, offer.request, _nobody, _nobody), offer.sequence, None, shared=True)
        slot = None if offer.serial is None else self._model.pool.slot_of(offer.serial)
        job.bind_like(slot, offer.start, offer.salt)
        return job

    def _read(self, operation: Operation) -> HostExtent:
        return self._residency.wait_for(self._adapter(operation.name, operation.key))

    def _adapter(self, name: str, key: str) -> Adapter:
        """The adapter that the first process means by a name."""
        for again in (True, False):
            with suppress(AdapterNotFoundError):
                adapter = self._model.adapter(name)
                if adapter.key == key:
                    return adapter
            if again and self._model.bank is not None:
                self._model.bank.reload()
        raise EngineError(
            f"adapter {name!r} is not what it is in the first process; open the same bank in all of them, and load "
            "adapters in the same order."
        )


def _offer(job: Job) -> Offer:
    request = dataclasses.replace(job.request, stop_strings=())
    serial = None if job.slot is None else job.slot.serial
    return Offer(job.handle.id, request, job.sequence, serial, job.start, job.salt)


def _nobody(handle: RequestHandle) -> None:
    """The request has its caller in another process."""
