"""The adapters that a model serves, by name: a bank's, and those that were loaded into the model alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias

import torch

from lorakit.adapters import names
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.layout import Extent
from lorakit.adapters.methods.alora import invocation_of
from lorakit.adapters.quantised import in_words
from lorakit.errors import AdapterExistsError, AdapterNotFoundError, BankCorruptedError, UnsupportedMethodError
from lorakit.runtime.host_cache import ExtentReader
from lorakit.runtime.sharding import Shards

_LOCAL = "local-"
"""Begins the keys of adapters that were loaded into a model alone: contents of a bank's are known by their hashes."""


class Adapter(NamedTuple):
    """An adapter as it is now: another may come under its name.

    Attributes:
        name: its name.
        key: what its slot is kept under, which stands for its content.
        source: where it can be read.
        invocation: the tokens from which on it acts, or None if it always does.
        added: the tokens that it adds to the vocabulary.
        pinned: whether it stays on the device once it is there.
    """

    name: str
    key: str
    source: Extent | ExtentReader
    invocation: tuple[int, ...] | None
    added: int
    pinned: bool


class Local(NamedTuple):
    """An adapter that no bank of the model's has: its slot's key, its tensors or their reader, what activates it."""

    key: str
    extent: Extent | ExtentReader
    invocation: tuple[int, ...] | None


Known: TypeAlias = Local | AdapterEntry


class Roster:
    """Which adapters there are; where they lie in memory is the pool's.

    Callers hold the model's lock over what belongs together. The bank may change at any time, so what is served under a
    name is asked for once (`known`) for all that is done with it.
    """

    def __init__(self, base: BaseModel, bank: AdapterBank | None, shards: Shards | None) -> None:
        """Serves a bank.

        Args:
            base: for which all adapters are.
            bank: its adapters are served, also those that come later.
            shards: this process's part of a base that several share, or None.
        """
        self._base = base
        self._bank = bank
        self._shards = shards
        self._local: dict[str, Local] = {}
        self._unloaded: set[str] = set()
        self._pinned: set[str] = set()
        self._numbers = itertools.count()
        self._warned: set[str] = set()
        self._followed = {} if bank is None else bank.entries
        for entry in () if bank is None else bank.entries.values():
            self._compare_base(entry)

    @property
    def names(self) -> list[str]:
        """The bank's, and those loaded into the model."""
        banked = () if self._bank is None else self._bank.names
        return [*(name for name in banked if name not in self._unloaded and name not in self._local), *self._local]

    def __contains__(self, name: str) -> bool:
        """However many there are, it takes no time."""
        banked = self._bank is not None and name not in self._unloaded and name in self._bank.entries
        return banked or name in self._local

    def known(self, name: str) -> Known:
        """What is served under a name.

        Raises:
            AdapterNotFoundError: nothing is.
        """
        local = self._local.get(name)
        if local is not None:
            return local
        entry = None if self._bank is None or name in self._unloaded else self._bank.entries.get(name)
        if entry is None:
            raise self.unknown(name)
        return entry

    def adapter(self, name: str) -> Adapter:
        """The same with all that is to be known of it; errors as there."""
        known = self.known(name)
        source = self.source(known)
        added = max((module.added for module in source.layout.modules), default=0)
        return Adapter(name, key_of(known), source, activation_of(name, known), added, name in self._pinned)

    def source(self, known: Known) -> Extent | ExtentReader:
        """Where the pool finds an adapter that the device does not have."""
        reader: ExtentReader
        if isinstance(known, Local):
            if isinstance(known.extent, Extent):
                return known.extent
            name, reader = known.key, known.extent
        else:
            assert self._bank is not None
            self._compare_base(known)  # it may have come into the bank after the model was made
            name, read = known.name, partial(_read_into, self._bank, known)
            reader = ExtentReader(known.layout, known.dtype, read)
        return reader if self._shards is None else self._shards.reader(reader, name)

    def sources(self) -> list[Extent | ExtentReader]:
        """The same of all adapters, but for those that are refused when they are asked for."""
        banked = () if self._bank is None else self._bank.entries.items()
        known: list[Known] = [entry for name, entry in banked if name not in self._unloaded and name not in self._local]
        found = []
        for one in (*known, *self._local.values()):
            with suppress(UnsupportedMethodError):
                found.append(self.source(one))
        return found

    def in_memory(self, name: str, form: AdapterForm) -> Local:
        """An adapter in host memory, under a key of its own.

        Raises:
            UnsupportedMethodError: it cannot be shared out as the base is.
        """
        extent = Extent.of_form(form)
        if self._shards is not None:
            extent = self._shards.extent(extent, name)
        return Local(f"{_LOCAL}{next(self._numbers)}", extent, invocation_of(form.method, form.config, name))

    def add(self, name: str, local: Local) -> None:
        """Serves an adapter that no bank of the model's has, in the place of one of its name."""
        self._local[name] = local

    def remove(self, name: str) -> None:
        """What is served under a name is no more, wherever it came from."""
        self._local.pop(name, None)
        if self._bank is not None and name in self._bank.entries:
            self._unloaded.add(name)

    def restore(self, name: str) -> None:
        """Serves the bank's adapter again after it was removed.

        Raises:
            AdapterNotFoundError: neither the bank nor the model has one of that name.
        """
        if name not in self._local:
            if self._bank is None or name not in self._bank:
                raise self.unknown(name)
            self._unloaded.discard(name)

    def is_pinned(self, known: Known) -> bool:
        """Whether what has this content stays on the device, under any name."""
        return any(key_of(self.known(name)) == key_of(known) for name in self.pinned)

    @property
    def pinned(self) -> frozenset[str]:
        """Names of adapters that stay on the device."""
        return frozenset(name for name in self._pinned if name in self)

    def pin(self, name: str) -> None:
        """Has an adapter stay on the device, and whatever comes under its name."""
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """It need not stay any longer."""
        self._pinned.discard(name)

    @property
    def is_behind(self) -> bool:
        """Whether the bank has changed since `follow`; costs nothing."""
        return self._bank is not None and self._bank.entries is not self._followed

    def follow(self) -> set[str]:
        """Looks at the bank: the keys of all that is served."""
        if self._bank is not None:
            self._followed = self._bank.entries
        served = (entry.blake3 for name, entry in self._followed.items() if name not in self._unloaded)
        return {*served, *(local.key for local in self._local.values())}

    def check_known(self, asked: Iterable[str | None]) -> None:
        """Refuses names that are not served; None stands for the base.

        Raises:
            AdapterNotFoundError: with the first of them.
        """
        serving = set(self.names)
        for name in dict.fromkeys(asked):
            if name is not None and name not in serving:
                raise self.unknown(name)

    def check_free(self, name: str) -> None:
        """Refuses a name that is taken.

        Raises:
            AdapterExistsError: it is.
        """
        if name in self.names:
            raise AdapterExistsError(f"the model already serves an adapter {name!r}; unload_adapter({name!r}) first.")

    def unknown(self, name: object) -> AdapterNotFoundError:
        """The error for a name that is not served, with those that are like it."""
        return names.not_found(name, self.names, "the model")

    def _compare_base(self, entry: AdapterEntry) -> None:
        """Warns of a bank's adapter that was computed from the base's weights as they are not here.

        Once for each way in which a bank's bases were quantised.
        """
        assert self._bank is not None
        name, here = entry.name, self._base.quantisation
        if entry.uses_base_weights and entry.base_quantisation not in {here, *self._warned}:
            self._warned.add(entry.base_quantisation)
            warnings.warn(
                f"adapter {name!r} ({entry.method}) of the bank at {self._bank.path} was computed from the weights of "
                f"the base {in_words(entry.base_quantisation)}, and is served on the base {in_words(here)}; so may "
                "others be. It is not PEFT's adapter exactly, but off by as much as the two bases' weights are apart. "
                "To be exact, export it again with this model as base_model.",
                stacklevel=4,
            )


def key_of(known: Known) -> str:
    """What an adapter's slot is kept under: its content, so that one replaced under its name is never served."""
    return known.key if isinstance(known, Local) else known.blake3


def is_local(key: str) -> bool:
    """Whether a key is that of an adapter in host memory, which no bank has."""
    return key.startswith(_LOCAL)


def activation_of(name: str, known: Known) -> tuple[int, ...] | None:
    """The tokens from which on an adapter acts, or None for one that always does."""
    return known.invocation if isinstance(known, Local) else invocation_of(known.method, known.config, name)


def _read_into(bank: AdapterBank, entry: AdapterEntry, buffer: torch.Tensor) -> Extent:
    """Reads an adapter, and no other that came under its name meanwhile."""
    try:
        return bank.read_into(entry, buffer)
    except BankCorruptedError as error:
        now = bank.entries.get(entry.name)
        if now is not None and now.blake3 == entry.blake3:
            raise
        message = f"adapter {entry.name!r} was replaced in the bank while it was read; try again."
        raise AdapterNotFoundError(message) from error
