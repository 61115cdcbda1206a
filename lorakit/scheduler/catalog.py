"""The adapters that a cluster serves: a bank's, and those that were loaded since. It holds no weights.

To servers it is what a model's adapters are elsewhere: they are loaded, replaced, pinned and unloaded by name.
"""

from __future__ import annotations

import tempfile
import threading
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
        gone: an adapter that is served no more.
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
        self._folder = Path(self._temporary.name) / "bank"
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._loaded: AdapterBank | None = None
        self._unloaded: set[str] = set()
        self._pinned: set[str] = set()
        self._follower: Callable[[Change], None] = lambda _: None

    def close(self) -> None:
        """Forgets what was loaded."""
        self._temporary.cleanup()

    def follow(self, follower: Callable[[Change], None]) -> None:
        """Has somebody told of changes, in the threads that make them."""
        self._follower = follower

    @property
    def folders(self) -> list[Path]:
        """The folders of the banks in which adapters lie, or will."""
        return [self.bank.path, self._folder]

    @property
    def adapters(self) -> list[str]:
        """The names."""
        with self._lock:
            loaded = {} if self._loaded is None else self._loaded.entries
            return [*(name for name in self.bank.names if name not in self._unloaded and name not in loaded), *loaded]

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
            before = self.known(name) if self.has_adapter(name) else None
            if before is not None and not replace:
                raise AdapterExistsError(f"an adapter {name!r} is already served; unload_adapter({name!r}) first.")
            if self._loaded is None:
                self._loaded = AdapterBank.create(
                    self._folder, base_id=self.bank.base_id, fingerprint=self.bank.fingerprint
                )
            # It may take minutes, in which others are served.
            self._loaded.add(name, source, base_model=self._base, overwrite=True)
            with self._lock:
                self._unloaded.add(name)  # the bank's of that name does not come back with its successor's end
                after = self.known(name)
        if before is not None and before.name != after.name:
            self._follower(Change(gone=before))
        if after.pinned:
            self._follower(Change(pinned=after))

    def unload_adapter(self, name: str) -> None:
        """Serves an adapter no more; a bank on disk keeps it.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            known = self.known(name)
            self._pinned.discard(name)
            if self._loaded is not None and name in self._loaded:
                self._loaded.remove(name)
            self._unloaded.add(name)
        self._follower(Change(gone=known))

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

    def rank(self, name: str) -> int:
        """The largest rank of an adapter's modules.

        Raises:
            AdapterNotFoundError: there is none.
        """
        with self._lock:
            return self._entry(name)[1].rank

    def _entry(self, name: str) -> tuple[AdapterBank, AdapterEntry]:
        found = self._find(name)
        if found is None:
            raise self._unknown(name)
        return found

    def _find(self, name: str) -> tuple[AdapterBank, AdapterEntry] | None:
        if self._loaded is not None and name in self._loaded.entries:
            return self._loaded, self._loaded.entries[name]
        if name in self._unloaded or name not in self.bank.entries:
            return None
        return self.bank, self.bank.entries[name]

    def _unknown(self, name: str) -> AdapterNotFoundError:
        return names.not_found(name, self.adapters, "the cluster")
