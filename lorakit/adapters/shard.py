"""Shards: safetensors files in which every adapter lies in one contiguous byte range.

The safetensors library reads them like any other file, but its writer sorts tensors by dtype and name over the whole
file, which would scatter an adapter, and wants all of them in memory. So the header is written here.

A shard is written front to back, one adapter in memory at a time, while its header, which comes first, is only known
at the end. So the writer leaves an area for the header, as large as the adapters to come should need, and fills what
remains with spaces, which the format allows. When the area or the shard is full, the next shard begins. The estimate
is the first adapter's need times their number, so adding a single one wastes nothing.

Knows entries, bytes and files; knows no index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from json.encoder import encode_basestring_ascii
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from blake3 import blake3

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.files import NewFile
from lorakit.adapters.pipeline import Pipeline
from lorakit.errors import BankCorruptedError, BankError

Progress = Callable[[str, int], None]
"""Called with an adapter's name and its stored bytes, once it is done."""

SHARD_BYTES = 4 << 30
"""A shard takes adapters up to this size: few files for a large bank, and no single file too large to copy or push."""

HEADER_LIMIT = 100_000_000
"""The largest header that the safetensors library reads."""

_ALIGNMENT = 64  # Where adapters begin in a shard: a cache line, and more than any kernel asks for.
_NAME = re.compile(r"bank-([0-9]{4,9})\.safetensors")
_SLACK = 256 << 10  # Bytes of header left for adapters that have more modules than the first of a batch.
_SYNC_BYTES = 64 << 20  # So many bytes are written before the disk is told to take them, while more are.
_KEPT_BYTES = 1 << 30
"""What was written last stays in the page cache, for whoever serves it next; no more of it. A large bank would push out
everything else, and the system copies faster into pages that it has just had back than into ever new ones.
"""

_METADATA = '{"__metadata__":{"format":"pt"}'


@dataclass(frozen=True)
class ShardFacts:
    """What the index says of one shard.

    Attributes:
        nbytes: the file's size.
        payload_nbytes: the bytes of the adapters written into it; less those still alive, this is dead weight.
    """

    nbytes: int
    payload_nbytes: int


def shard_name(number: int) -> str:
    """The file name of the n-th shard."""
    return f"bank-{number:04d}.safetensors"


def shard_number(name: str) -> int | None:
    """The number in a shard's file name; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def header_entries(entry: AdapterEntry, start: int) -> str:
    """An adapter's part of a header, as JSON with a leading comma.

    Args:
        entry: the adapter.
        start: its first byte, counted from the end of the header.
    """
    parts = []
    for name, code, shape, begin, end in entry.places():
        shape_json = ",".join(map(str, shape))
        offsets = f"{start + begin},{start + end}"
        quoted = encode_basestring_ascii(f"{entry.name}/{name}")
        parts.append(f',{quoted}:{{"dtype":"{code}","shape":[{shape_json}],"data_offsets":[{offsets}]}}')
    return "".join(parts)


class _Shard:
    """One shard under construction."""

    def __init__(self, path: Path, header_area: int) -> None:
        self.path = path
        self.payload = 0
        # The length of the header is 8 bytes; the data begins aligned.
        self.data_start = _aligned(8 + header_area)
        self._header = [_METADATA]
        # The closing brace is counted from the beginning.
        self._header_nbytes = len(_METADATA) + 1
        self._end = 0
        self._file = NewFile(path)

    def place(self, entry: AdapterEntry, limit: int) -> AdapterEntry | None:
        """Gives an adapter its place; None where there is no more room for it."""
        start = _aligned(self._end)
        if self.payload and start + entry.stored_nbytes > limit:
            return None
        text = header_entries(entry, start)
        if start > self._end:
            gap = f'"dtype":"U8","shape":[{start - self._end}],"data_offsets":[{self._end},{start}]'
            text = f",{json.dumps(entry.name + '/~pad')}:{{{gap}}}{text}"
        if 8 + self._header_nbytes + len(text) > self.data_start:
            return None
        self._header.append(text)
        self._header_nbytes += len(text)
        # The gap before it is a hole of zeros in the file.
        self._end = start + entry.stored_nbytes
        self.payload += entry.stored_nbytes
        return replace(entry, shard=self.path.name, offset=self.data_start + start)

    def write(self, data: memoryview, offset: int) -> None:
        """Writes at a byte offset of the file."""
        self._file.write(data, offset)

    def sync(self) -> None:
        """Puts on the disk what was written so far."""
        self._file.sync(_KEPT_BYTES)

    def commit(self, syncs: Sequence[Future[None]], *, is_last: bool) -> ShardFacts:
        """Writes the header and gives the file its name; raises what syncs before raised."""
        for sync in syncs:
            sync.result()
        area = self.data_start - 8
        header = ("".join(self._header) + "}").encode("ascii").ljust(area)
        assert len(header) == area
        self._file.write(area.to_bytes(8, "little") + header, 0)
        self._file.commit(_KEPT_BYTES if is_last else 0)
        return ShardFacts(self.data_start + self._end, self.payload)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


class ShardSeries:
    """Writes adapters one after another into as many new shards as they need.

    A context. What is added is hashed and written in threads (`pipeline`), and put on the disk meanwhile. What it
    leaves behind after an error is no part of the bank, as no index names it; sweeping it away is the bank's part,
    which alone knows whether the index was replaced by then.

    Args:
        folder: the bank's.
        first: the first shard's number.
        shard_bytes: the size at which the next shard begins.
        progress: called for each adapter written, in the order added.
    """

    def __init__(
        self, folder: Path, first: int, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
    ) -> None:
        self._folder = folder
        self._first = first
        self._shard_bytes = shard_bytes
        self._progress = progress
        self._shards: list[_Shard] = []
        self._facts: dict[str, Future[ShardFacts]] = {}
        self._syncs: list[Future[None]] = []  # of the last shard
        self._unsynced = 0
        self._entries: list[AdapterEntry] = []
        self._pipeline = Pipeline()
        # One alone: shards are completed one after another.
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="lorakit-sync")

    def __enter__(self) -> ShardSeries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipeline.close()
        self._syncer.shutdown(wait=True, cancel_futures=True)
        for shard in self._shards:
            shard.close()

    def buffer(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes for an adapter's next block, used again when that is written."""
        return self._pipeline.buffer(nbytes)

    def add(self, entry: AdapterEntry, blocks: Iterable[memoryview], more: int, longest_name: int) -> None:
        """Writes one adapter.

        Args:
            entry: the adapter; where it lies and its hash are filled in.
            blocks: the bytes of its range; they must not change until they are written. An error of writing may come
                from a later call, at the latest from `finish`.
            more: how many adapters will follow, as far as is known; sizes the area of the header.
            longest_name: the length of the longest name among them.
        """
        is_open = len(self._shards) > len(self._facts)
        placed = self._shards[-1].place(entry, self._shard_bytes) if is_open else None
        if placed is None:
            self._close_shard(is_last=False)
            self._open_shard(entry, more, longest_name)
            placed = self._shards[-1].place(entry, self._shard_bytes)
        assert placed is not None, "a new shard takes the adapter it was sized for"
        digest, offset = blake3(), placed.offset
        for block in blocks:
            self._pipeline.send(block, self._shards[-1].write, offset, digest)
            offset += block.nbytes
        assert offset == placed.offset + placed.stored_nbytes, "every byte of the range is written, gaps too"
        self._pipeline.then(partial(self._written, placed, digest))

    def finish(self) -> tuple[list[AdapterEntry], dict[str, ShardFacts]]:
        """Completes the shards; their files are whole and named, and safe once the folder is synced.

        Returns:
            The entries in the order added, with shard, offset and hash; and the new shards' facts.
        """
        self._close_shard(is_last=True)
        return self._entries, {name: facts.result() for name, facts in self._facts.items()}

    def _written(self, entry: AdapterEntry, digest: blake3) -> None:
        self._entries.append(replace(entry, blake3=digest.hexdigest()))
        self._unsynced += entry.stored_nbytes
        if self._unsynced > _SYNC_BYTES:
            self._unsynced = 0
            # With the rest, its errors are raised when the shard is completed.
            self._syncs.append(self._syncer.submit(self._shards[-1].sync))
        if self._progress:
            self._progress(entry.name, entry.stored_nbytes)

    def _close_shard(self, *, is_last: bool) -> None:
        self._pipeline.finish()
        if len(self._shards) > len(self._facts):
            shard = self._shards[-1]
            self._facts[shard.path.name] = self._syncer.submit(shard.commit, self._syncs, is_last=is_last)
            self._syncs = []

    def _open_shard(self, entry: AdapterEntry, more: int, longest_name: int) -> None:
        count = 1 + min(more, self._shard_bytes // max(1, entry.stored_nbytes))
        # Measured where the last one would lie, as its offsets have the most digits, and with the gap before it.
        example = replace(entry, name="x" * max(longest_name, len(entry.name)))
        each = len(header_entries(example, (count - 1) * _aligned(entry.stored_nbytes))) + len(example.name) + 96
        if each + 64 > HEADER_LIMIT:
            raise BankError(
                f"adapter {entry.name!r} has too many modules for the header of a safetensors file: "
                "split it into several adapters."
            )
        area = min(len(_METADATA) + 1 + count * each + (_SLACK if more else 0), HEADER_LIMIT - 64)
        number = self._first + len(self._shards)
        self._shards.append(_Shard(self._folder / shard_name(number), area))


def read_range(path: Path, offset: int, buffer: torch.Tensor) -> None:
    """Reads bytes of a shard.

    Args:
        path: the shard.
        offset: the first byte.
        buffer: (n,) uint8 on the CPU, contiguous; may be pinned. All of it is filled.

    Raises:
        BankCorruptedError: the file is missing, cannot be read or is too short; with the reason alone.
    """
    view = buffer.numpy().data
    end = offset + view.nbytes
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while view.nbytes:
                count = file.readinto(view)
                if not count:
                    raise _cut_off(end)
                view = view[count:]
    except OSError as error:
        raise _unreadable(error) from error


def check_size(path: Path, end: int) -> None:
    """Checks that a shard reaches up to a byte, so that no memory is taken for what is not there.

    Raises:
        BankCorruptedError: the file is missing or too short; with the reason alone.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(error) from error
    if size < end:
        raise _cut_off(end)


def _unreadable(error: OSError) -> BankCorruptedError:
    return BankCorruptedError(f"the file cannot be read ({error.strerror or error})")


def _cut_off(end: int) -> BankCorruptedError:
    return BankCorruptedError(f"the file was cut off before byte {end}")


def read_header(path: Path, nbytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Reads a shard's header and checks that it describes the whole file without holes.

    Args:
        path: the shard.
        nbytes: the size that the file should have.

    Returns:
        Tensor name → (safetensors' dtype code, shape, first byte, byte after the last), bytes counted from the
        beginning of the file.

    Raises:
        BankCorruptedError: it is no header of a safetensors file, or does not fit the file; with the reason alone.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 2 <= length <= min(HEADER_LIMIT, size - 8) else b""
    except OSError as error:
        raise _unreadable(error) from error
    if size != nbytes:
        raise BankCorruptedError(f"the file has {size} bytes instead of {nbytes}")
    try:
        header = json.loads(text)
        if header["__metadata__"] != {"format": "pt"}:
            raise ValueError
        tensors = {name: _header_tensor(value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BankCorruptedError("its header is no safetensors header") from error
    place = 8 + length
    for _, _, begin, end in sorted(tensors.values(), key=lambda tensor: tensor[2:]):
        if begin != place or end < begin:
            raise BankCorruptedError("its header describes tensors with holes or overlaps")
        place = end
    if place != size:
        raise BankCorruptedError("its header describes another file size")
    return tensors


def _header_tensor(value: Any, data_start: int) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = value["data_offsets"]
    if type(begin) is not int or type(end) is not int or type(value["dtype"]) is not str:
        raise TypeError
    return value["dtype"], tuple(value["shape"]), data_start + begin, data_start + end
