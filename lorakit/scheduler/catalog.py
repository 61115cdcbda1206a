"""The adapters that a cluster serves: a bank's, and those that were loaded since. It holds no weights.

To servers it is what a model's adapters are elsewhere: they are loaded, replaced, pinned and unloaded by name. A
sequence holds the content that it began with: any replica can read that until the sequence has ended, whatever its name
stands for by then.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from lorakit.adapters import names
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.methods.alora import invocation_of
from lorakit.adapters.peft_reader import Source
from lorakit.errors import AdapterExistsError, AdapterNotFoundError
from lorakit.runtime.host_cache import ExtentReader
from lorakit.runtime.roster import Adapter
from lorakit.scheduler.messages import Known


class Change(NamedTuple):
    """What replicas have to be told.

    Attributes:
        gone: an adapter that is served no more, and that no sequence needs.
        pinned: an adapter that is to stay on the device.
        unpinned: an adapter that need not.
    """

    gone: Known | None = None
    pinned: Known | None = None
    unpinned: Known | None = None


class Catalog:
    """Adapters by name. All methods may be called from any thread."""

    def __init__(self, bank: AdapterBank, base: str | nn.Module) -> None:
        """Serves a bank's adapters.

        Args:
            bank: open.
            base: the base, its folder or its Hub id: conversions may read its weights.
        """
        self.bank = bank
        self._base = base
        self._temporary = tempfile.TemporaryDirectory(prefix="lorakit-adapters-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._folders = (self._folder / str(number) for number in itertools.count())
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._loaded: dict[str, AdapterBank] = {}  # a bank each, so that one can go while its successor is there
        self._unloaded: set[str] = set()
        self._pinned: set[str] = set()
        self._held: Counter[str] = Counter()  # by `Known.name`
        self._leaving: dict[str, tuple[Known, AdapterBank | None]] = {}
        self._follower: Callable[[Change], None] = lambda _: None

    def close(self) -> None:
        """Forgets what was loaded."""
        self._temporary.cleanup()

    def follow(self, follower: Callable[[Change], None]) -> None:
        """Has somebody told of changes, in the threads that make them."""
        self._follower = follower

    @property
    def folders(self) -> list[Path]:
        """Where adapters lie, or will: folders of banks, or of such folders."""
        return [self.bank.path, self._folder]

    @property
    def adapters(self) -> list[str]:
        """The names."""
        with self._lock:
            mine = (name for name in self.bank.names if name not in self._unloaded and name not in self._loaded)
            return [*mine, *self._loaded]

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter is served."""
        with self._lock:
            return self._find(name) is not None

    def adapter(self, name: str) -> Adapter:
        """An adapter as it is now; its reader is its bank's.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            bank, entry = self._entry(name)
            reader = ExtentReader(entry.layout, entry.dtype, partial(bank.read_into, entry))
            added = max((module.added for module in entry.layout.modules), default=0)
            invocation = invocation_of(entry.method, entry.config, name)
            return Adapter(name, entry.blake3, reader, invocation, added, name in self._pinned)

    def known(self, name: str) -> Known:
        """The same, as replicas know it.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            _, entry = self._entry(name)
            return Known(
                f"{name}@{entry.blake3}",
                entry.blake3,
                entry.layout,
                entry.dtype,
                invocation_of(entry.method, entry.config, name),
                name in self._pinned,
            )

    def hold(self, name: str) -> Known:
        """The same; it can be read until it is released as often as it was held.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            known = self.known(name)
            self._held[known.name] += 1
            return known

    def release(self, known: Known) -> None:
        """What was held is held once less; one that is served no more goes with the last."""
        with self._lock:
            self._held[known.name] -= 1
            if self._held[known.name]:
                return
            del self._held[known.name]
            left = self._leaving.pop(known.name, None)
        if left is not None:
            self._forget(*left)

    def is_needed(self, known: Known) -> bool:
        """Whether an adapter is served, or held."""
        with self._lock:
            return known.name in self._held or self._serves(known)

    @property
    def pinned(self) -> frozenset[str]:
        """Names of adapters that stay on the devices."""
        with self._lock:
            return frozenset(name for name in self._pinned if self._find(name) is not None)

    def load_adapter(self, name: str, source: Source | None = None, *, replace: bool = False) -> None:
        """As `MultiLoraModel.load_adapter`: what is converted lies in a bank of its own until the cluster ends.

        Raises:
            AdapterExistsError: the name is taken, and `replace` does not say so.
            AdapterNotFoundError: no source, and none in the bank.
            CheckpointError, UnsupportedMethodError, …: as `lorakit.export` raises them; nothing is changed.
        """
        names.check_name(name)
        if source is None:
            with self._lock:
                if name not in self.bank:
                    raise names.not_found(name, self.adapters, "the bank")
                self._unloaded.discard(name)
            return
        with self._loading:
            if self.has_adapter(name) and not replace:
                raise AdapterExistsError(f"an adapter {name!r} is already served; unload_adapter({name!r}) first.")
            bank = AdapterBank.create(next(self._folders), base_id=self.bank.base_id, fingerprint=self.bank.fingerprint)
            try:
                # It may take minutes, in which others are served.
                bank.add(name, source, base_model=self._base)
            except BaseException:
                shutil.rmtree(bank.path, ignore_errors=True)
                raise
            with self._lock:
                before = self.known(name) if self.has_adapter(name) else None
                old = self._loaded.get(name)
                self._loaded[name] = bank
                self._unloaded.add(name)  # the bank's of that name does not come back with its successor's end
                after = self.known(name)
        if before is not None:
            if after.pinned and before.name != after.name:
                self._follower(Change(unpinned=before))
            self._retire(before, old)
        if after.pinned:
            self._follower(Change(pinned=after))

    def unload_adapter(self, name: str) -> None:
        """Serves an adapter no more; a bank on disk keeps it.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            known = self.known(name)
            pinned = name in self._pinned
            self._pinned.discard(name)
            bank = self._loaded.pop(name, None)
            self._unloaded.add(name)
        if pinned:
            self._follower(Change(unpinned=known))
        self._retire(known, bank)

    def pin_adapter(self, name: str) -> None:
        """Has an adapter brought to every replica's device, where it stays.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            self._entry(name)
            self._pinned.add(name)
            known = self.known(name)
        self._follower(Change(pinned=known))

    def unpin_adapter(self, name: str) -> None:
        """Lets an adapter make room for others again.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            known = self.known(name)
            self._pinned.discard(name)
        self._follower(Change(unpinned=known))

    def _retire(self, known: Known, bank: AdapterBank | None) -> None:
        """Something is not served any more under its name: it goes, or does so when nobody holds it.

        Args:
            known: it.
            bank: the one in which it lies alone, if it was loaded.
        """
        spare = bank
        with self._lock:
            waits = known.name in self._held and not self._serves(known)
            if waits:
                # The same content may be waiting already, from an earlier bank: one is enough.
                _, spare = self._leaving.get(known.name, (known, None))
                self._leaving[known.name] = known, bank
        if not waits:
            self._forget(known, bank)
        elif spare is not None:
            shutil.rmtree(spare.path, ignore_errors=True)

    def _forget(self, known: Known, bank: AdapterBank | None) -> None:
        with self._lock:
            served = self._serves(known)  # the same content came again
        if not served:
            self._follower(Change(gone=known))
        if bank is not None:
            shutil.rmtree(bank.path, ignore_errors=True)

    def _serves(self, known: Known) -> bool:
        found = self._find(known.name.rpartition("@")[0])
        return found is not None and found[1].blake3 == known.key

    def _entry(self, name: str) -> tuple[AdapterBank, AdapterEntry]:
        found = self._find(name)
        if found is None:
            raise self._unknown(name)
        return found

    def _find(self, name: str) -> tuple[AdapterBank, AdapterEntry] | None:
        if name in self._loaded:
            return self._loaded[name], self._loaded[name].entries[name]
        if name in self._unloaded or name not in self.bank.entries:
            return None
        return self.bank, self.bank.entries[name]

    def _unknown(self, name: str) -> AdapterNotFoundError:
        return names.not_found(name, self.adapters, "the cluster")
