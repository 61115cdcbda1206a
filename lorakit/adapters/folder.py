"""A bank's folder: its index on the disk, the lock of its writers, and changes that are whole or not at all.

Shards never change: adding writes new ones, and the change becomes true in one step when the index is replaced. Killed
before it, the old bank is whole; after it, the new one. What a killed writer leaves behind is swept away by the next
one. Writers take turns by a lock on `.lock`; readers need none.

Knows files and their order of writing; knows no tensor's meaning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from filelock import FileLock, Timeout

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.files import TEMPORARY, NewFile, sync_folder, writing
from lorakit.adapters.index import Index
from lorakit.adapters.shard import check_size, read_range, shard_number
from lorakit.errors import BankError

INDEX_NAME = "bank.json"
LOCK_NAME = ".lock"
INDEX_LIMIT = 1 << 29
"""No index is larger than this (bytes): some hundred thousand adapters have room. Larger ones are not even read."""

_logger = logging.getLogger(__name__)


class BankFolder:
    """A bank's files.

    Attributes:
        path: the folder.
        index: the index as it was when last read or written through this object.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self.index = index

    @classmethod
    @contextmanager
    def founding(cls, path: Path, index: Index, *, overwrite: bool = False) -> Iterator[BankFolder]:
        """The place for a new bank. Inside, under the lock, `replace_index` makes it true in one step.

        Until then, and after an error, a bank that is there stays as it is, and one that is not leaves nothing.

        Args:
            path: a folder that is empty or not there yet, or with `overwrite` one that holds a bank.
            index: what the new bank begins with.
            overwrite: take the place of a bank that is there. Its shards' numbers are not used again: a reader with
                the old index misses a file then, instead of reading another adapter's bytes.

        Raises:
            BankError: the folder holds something already, or cannot be written.
        """
        check_free(path, overwrite)
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, index)
        try:
            with folder.locked():
                # Once more: another process may have been faster.
                check_free(path, overwrite)
                if (path / INDEX_NAME).is_file():
                    folder.index = replace(index, next_shard=_next_shard(path))
                try:
                    yield folder
                finally:
                    # The disk, not this object, says what is true.
                    with suppress(OSError, BankError):
                        folder.index = load_index(path) if (path / INDEX_NAME).is_file() else index
                        folder._sweep()
        except BaseException:
            if path in made and not (path / INDEX_NAME).exists():
                with suppress(OSError):
                    (path / LOCK_NAME).unlink(missing_ok=True)
                    for parent in made:  # unless somebody uses them by now
                        parent.rmdir()
            raise

    @classmethod
    def open(cls, path: Path) -> BankFolder:
        """Reads a folder's index, and nothing else.

        Raises:
            BankError: there is no bank, its index is damaged, or it was written by a newer lorakit.
        """
        return cls(path, load_index(path))

    @property
    def label(self) -> str:
        """The bank's name in messages."""
        return str(self.path)

    @property
    def remedy(self) -> str:
        """What to do where its files are not what its index says."""
        return (
            "Restore the shards from a copy, or add the adapters again with overwrite=True. If another process changed "
            "the bank, open it again first."
        )

    def reload(self) -> None:
        """Reads the index again.

        Raises:
            BankError: as `open`.
        """
        self.index = load_index(self.path)

    def read(self, entry: AdapterEntry, nbytes: int) -> torch.Tensor:
        """The first bytes of an adapter's range, in fresh memory.

        Returns:
            (nbytes,) uint8.

        Raises:
            BankCorruptedError: the shard is missing or too short; nothing is allocated then.
        """
        shard = self.path / entry.shard
        check_size(shard, entry.offset + nbytes)
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        read_range(shard, entry.offset, buffer)
        return buffer

    def read_into(self, entry: AdapterEntry, buffer: torch.Tensor) -> None:
        """Fills a uint8 buffer with the first bytes of an adapter's range; errors as `read`."""
        read_range(self.path / entry.shard, entry.offset, buffer)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other writers out."""
        lock = FileLock(self.path / LOCK_NAME)
        with writing(self.path):
            try:
                lock.acquire(timeout=2)
            except Timeout:
                _logger.warning("waiting for another writer of bank %s", self.path)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def changing(self) -> Iterator[Index]:
        """Takes the lock; gives the index as it is on the disk now. Sweeps before, and after an error."""
        if not (self.path / INDEX_NAME).is_file():
            raise _no_bank(self.path)  # Not even the lock's file should appear there.
        with self.locked():
            self.reload()
            self._sweep()
            try:
                yield self.index
            except BaseException:
                # The disk, not this object, says whether the change became true before the error.
                with suppress(OSError, BankError):
                    self.reload()
                    self._sweep()
                raise
            self._sweep()

    def replace_index(self, index: Index) -> None:
        """Makes a change true. Only under the lock."""
        # The shards' names must last before an index that relies on them does.
        sync_folder(self.path)
        with NewFile(self.path / INDEX_NAME) as file:
            file.write(index.dump(), 0)
            file.commit()
        self.index = index
        sync_folder(self.path)

    def _sweep(self) -> None:
        """Deletes shards that the index does not name, and unfinished files. Only under the lock."""
        for path in self.path.iterdir():
            whole = path.name.removesuffix(TEMPORARY)
            ours = whole == INDEX_NAME or shard_number(whole) is not None
            named = path.name == INDEX_NAME or path.name in self.index.shards
            if ours and not named:
                # What cannot be deleted now is deleted by a later sweep.
                with suppress(OSError):
                    path.unlink()


def _next_shard(folder: Path) -> int:
    """The number after all that a bank has used, or, where its index cannot be read, after those of its files."""
    try:
        return load_index(folder).next_shard
    except BankError:  # damaged, or of another format: it is to go either way
        return 1 + max(shard_number(path.name.removesuffix(TEMPORARY)) or 0 for path in folder.iterdir())


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a place where a new bank would disturb something.

    Raises:
        BankError: a bank is there and `overwrite` is off, or anything else is there, or it cannot be looked at.
    """
    with writing(folder):
        _check_free(folder, overwrite)


def _check_free(folder: Path, overwrite: bool) -> None:
    if (folder / INDEX_NAME).exists():
        if overwrite:
            return
        raise BankError(
            f"{str(folder)!r} holds a bank already: add to it with AdapterBank.open(path).add(name, source) "
            "(`lorakit export --add`), replace it with overwrite=True (`--overwrite`), or choose another folder."
        )
    if folder.is_dir():
        # What a killed writer may have left is no reason to refuse.
        others = sorted(path.name for path in folder.iterdir())
        others = [name for name in others if name != LOCK_NAME and not _is_unfinished(name)]
        if others:
            raise BankError(f"{str(folder)!r} is not empty (it holds {others[0]!r}): choose an empty or a new folder.")
    elif folder.exists():
        raise BankError(f"{str(folder)!r} is a file: choose an empty or a new folder.")


def _is_unfinished(name: str) -> bool:
    whole = name.removesuffix(TEMPORARY)
    return name != whole and (whole == INDEX_NAME or shard_number(whole) is not None)


class FixedFolder(BankFolder):
    """A bank's files seen by an index that stays as it is: some of its adapters, or as it was at one time."""

    def reload(self) -> None:
        """Nothing is newer."""

    def changing(self) -> NoReturn:
        """Refuses.

        Raises:
            BankError: always.
        """
        raise BankError(
            f"the bank {self.label!r} cannot be changed here: copy it with bank.copy(folder), and change the copy."
        )


def _no_bank(folder: Path) -> BankError:
    problem = "is no bank: it has no bank.json" if folder.is_dir() else "is no folder"
    return BankError(f"{str(folder)!r} {problem}. Check the path, or make a bank with lorakit.export.")


def load_index(folder: Path) -> Index:
    """Reads a folder's index, and nothing else.

    Raises:
        BankError: there is no bank, its index is damaged, or it was written by a newer lorakit.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise _no_bank(folder)
    try:
        # One byte more than is allowed, so that a file that grows meanwhile is seen too.
        with open(path, "rb") as file:
            data = file.read(min(path.stat().st_size, INDEX_LIMIT) + 1)
        if len(data) > INDEX_LIMIT:
            raise BankError("it is too large for an index")
        return Index.parse(data)
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror or error}. Fix its permissions or path.") from error
    except BankError as error:
        raise BankError(f"{path} cannot be used: {error}. Restore it from a copy, or export the bank again.") from error
