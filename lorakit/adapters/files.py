"""Files that are there whole or not at all, also after a crash or a power cut.

Knows bytes and names of files; knows nothing of what they mean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from lorakit.errors import BankError

TEMPORARY = ".tmp"
"""What a file's name ends with until it is whole."""


_WRITE_BYTES = 1 << 18
"""The system takes this much at a time: with more it may look for large pages, at three times the processor's time."""


_COPY_BYTES = 1 << 24


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write into a `BankError`."""
    try:
        yield
    except OSError as error:
        raise BankError(
            f"cannot write {path}: {error.strerror or error}. "
            "Free space or fix the folder's permissions, then try again."
        ) from error


class NewFile:
    """A file under construction: it gets its name when all of it is on the disk.

    A context; left without `commit`, only the temporary file remains, for a later sweep.

    Args:
        path: its name in the end.

    Raises:
        BankError: from every method, where the system refuses (no space, no permission).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._end = 0
        with writing(path):
            self._handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Writes at a byte offset; what is skipped reads as zeros."""
        view = memoryview(data)
        with writing(self.path):
            while view.nbytes:
                count = os.pwrite(self._handle, view[:_WRITE_BYTES], offset)
                view = view[count:]
                offset += count
        self._end = max(self._end, offset)

    def sync(self, keep: int | None = None) -> None:
        """Puts the bytes on the disk.

        Args:
            keep: so many of the last bytes written stay in the page cache; None: all of them.
        """
        end = self._end
        with writing(self.path):
            os.fsync(self._handle)
        if keep is not None and end > keep and hasattr(os, "posix_fadvise"):  # not on every system
            with suppress(OSError):  # it was advice
                os.posix_fadvise(self._handle, 0, end - keep, os.POSIX_FADV_DONTNEED)

    def commit(self, keep: int | None = None) -> None:
        """Puts the bytes on the disk, then gives the file its name; `sync_folder` makes the name last.

        Args:
            keep: as in `sync`.
        """
        # Bytes first: a name that survives a power cut must not lead to bytes that did not.
        self.sync(keep)
        with writing(self.path):
            self.close()
            os.replace(self._temporary, self.path)

    def close(self) -> None:
        """Lets go of the file."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)


def copy_file(source: Path, path: Path) -> None:
    """Copies a file; the copy gets its name when all of it is on the disk.

    Raises:
        BankError: the system refuses.
    """
    with writing(path), open(source, "rb", buffering=0) as read, NewFile(path) as file:
        offset = 0
        while data := read.read(_COPY_BYTES):
            file.write(data, offset)
            offset += len(data)
        file.commit()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    with writing(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
