"""Is a bank what its index says? Sizes, headers, hashes and finite weights, read from its files.

Knows a bank's files and entries; changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from blake3 import blake3

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.finite import is_finite
from lorakit.adapters.folder import BankFolder
from lorakit.adapters.layout import Extent
from lorakit.adapters.shard import Progress, read_header
from lorakit.errors import BankCorruptedError

WRONG_HASH = "its bytes do not match their BLAKE3 hash"


@dataclass(frozen=True)
class Damage:
    """One thing wrong with a bank's files.

    Attributes:
        shard: the file.
        adapter: the adapter whose bytes it touches, or None where the file's header is wrong but the bytes may be well.
        reason: what is wrong.
    """

    shard: str
    adapter: str | None
    reason: str

    def __str__(self) -> str:
        subject = f"adapter {self.adapter!r} in {self.shard}" if self.adapter else f"shard {self.shard}"
        return f"{subject}: {self.reason}"


def damages(folder: BankFolder, entries: Iterable[AdapterEntry], progress: Progress | None = None) -> list[Damage]:
    """Reads these adapters and their shards' headers, and compares them with the index.

    Args:
        folder: the bank's files.
        entries: the adapters to look at.
        progress: called for each adapter.

    Returns:
        All that is wrong; empty if nothing is.
    """
    by_shard: dict[str, list[AdapterEntry]] = {}
    for entry in entries:
        by_shard.setdefault(entry.shard, []).append(entry)
    found = []
    # Hashing releases the GIL; each thread holds one adapter.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="lorakit-verify") as pool:
        for shard, members in by_shard.items():
            found += _header_damages(folder, shard, members)
            ordered = sorted(members, key=lambda entry: entry.offset)
            for entry, damage in zip(ordered, pool.map(partial(_damages_of, folder), ordered), strict=True):
                found += damage
                if progress:
                    progress(entry.name, entry.stored_nbytes)
    return found


def _header_damages(folder: BankFolder, shard: str, entries: Sequence[AdapterEntry]) -> list[Damage]:
    try:
        header = read_header(folder.path / shard, folder.index.shards[shard].nbytes)
    except BankCorruptedError as error:
        return [Damage(shard, None, str(error))]
    found = []
    for entry in entries:
        for name, code, shape, begin, end in entry.tensors():
            if header.get(name) != (code, shape, entry.offset + begin, entry.offset + end):
                found.append(Damage(shard, entry.name, f"the shard's header has another place for {name}"))
                break
    return found


def _damages_of(folder: BankFolder, entry: AdapterEntry) -> list[Damage]:
    try:
        buffer = folder.read(entry, entry.stored_nbytes)
    except BankCorruptedError as error:
        return [Damage(entry.shard, entry.name, str(error))]
    if blake3(buffer.numpy().data).hexdigest() != entry.blake3:
        return [Damage(entry.shard, entry.name, WRONG_HASH)]
    extent = Extent.of_bytes(entry.layout, entry.dtype, buffer)
    if not (is_finite(extent.weights) and is_finite(extent.vectors)):
        return [Damage(entry.shard, entry.name, "it holds NaN or Inf")]
    return []
