"""Adapters in host memory, as they will lie on the device: one flat buffer each, copied there in one go.

The buffers are pinned for a device that copies from pinned memory by itself. Those used longest ago are forgotten
when a limit of bytes is reached. Knows keys, bytes and where an adapter can be read; knows no device, no slot and no
stream.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from lorakit.adapters.layout import Extent, Layout

PINNED_LIMIT = 4 << 30
"""Bytes that a cache of pinned memory may take if nothing else is said. Pinned memory cannot be swapped out, so it must
not grow with the bank: 4 GiB hold some hundred adapters of a 7B model at rank 16, and leave a server most of its
memory."""


@dataclass(frozen=True, eq=False)
class ExtentReader:
    """An adapter that is not in memory yet.

    Attributes:
        layout: where its tensors lie.
        dtype: of A and B as they are stored.
        read_into: fills a flat uint8 buffer of `nbytes` in host memory, and gives its extent, as
            `AdapterBank.read_into` does.
    """

    layout: Layout
    dtype: torch.dtype
    read_into: Callable[[torch.Tensor], Extent]

    @property
    def nbytes(self) -> int:
        """The extent's bytes as stored."""
        return self.layout.nbytes(self.dtype)


@dataclass(eq=False)
class HostExtent:
    """An adapter in host memory, ready to be copied to the device.

    Attributes:
        layout: where its tensors lie.
        dtype: of A and B.
        buffer: (layout.nbytes(dtype),) uint8, see `Extent.of_bytes`; not to be changed.
        copied: whether the last copy out of the buffer has ended; None if none is under way.
    """

    layout: Layout
    dtype: torch.dtype
    buffer: torch.Tensor
    copied: Callable[[], bool] | None = None

    @property
    def busy(self) -> bool:
        """Whether a copy still reads the buffer."""
        if self.copied is not None and self.copied():
            self.copied = None
        return self.copied is not None


class HostCache:
    """Extents by key, least recently used first. A key stands for an adapter's content.

    It has no lock: its owner's covers every call but `read`.

    Attributes:
        limit: bytes that the buffers together may take; 0 keeps nothing.
        pinned: whether the buffers are in pinned memory.
        reads: adapters that were brought here.
        read_seconds: what that took, summed.
    """

    def __init__(self, *, limit: int, pinned: bool = False) -> None:
        """Makes an empty cache.

        Args:
            limit: bytes that the buffers together may take; 0 keeps nothing.
            pinned: take pinned memory, which needs CUDA.
        """
        self.limit = limit
        self.pinned = pinned
        self.reads, self.read_seconds = 0, 0.0
        self._counting = threading.Lock()
        self._entries: OrderedDict[str, HostExtent] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers take; pinned ones with what their allocator adds."""
        return self._nbytes

    @property
    def keys(self) -> list[str]:
        """What is kept, least recently used first."""
        return list(self._entries)

    def __contains__(self, key: str) -> bool:
        """Whether an adapter is kept; unlike `get`, this uses it not."""
        return key in self._entries

    def get(self, key: str) -> HostExtent | None:
        """The adapter, now the most recently used, or None if it is not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, source: Extent | ExtentReader, dtype: torch.dtype | None = None) -> HostExtent:
        """Brings an adapter into host memory, and keeps it if it has room beside those that are being copied.

        Args:
            key: what it is found by; an adapter of that key is replaced.
            source: the adapter. One that is stored in `dtype` is read straight into its buffer.
            dtype: what A and B are cast to; None: their own.

        Returns:
            The adapter, kept or not.

        Raises:
            BankCorruptedError, …: as `source.read_into` raises them; the cache is as it was.
        """
        extent = self.read(source, dtype)
        self.keep(key, extent)
        return extent

    def read(self, source: Extent | ExtentReader, dtype: torch.dtype | None = None) -> HostExtent:
        """Brings an adapter into host memory, and does not keep it. Alone of all here, it may run in any thread.

        Args:
            source: as in `put`.
            dtype: as in `put`.

        Raises:
            BankCorruptedError, …: as `source.read_into` raises them.
        """
        started = time.monotonic()
        dtype = dtype or source.dtype
        buffer = torch.empty(source.layout.nbytes(dtype), dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        _fill(buffer, source, dtype)
        with self._counting:
            self.reads += 1
            self.read_seconds += time.monotonic() - started
        return HostExtent(source.layout, dtype, buffer)

    def keep(self, key: str, extent: HostExtent) -> None:
        """Keeps an adapter that was read, if it has room beside those that are being copied.

        Args:
            key: what it is found by; an adapter of that key is replaced.
            extent: the adapter.
        """
        self.drop(key)
        if self._make_room(self._taken(extent)):
            self._entries[key] = extent
            self._nbytes += self._taken(extent)

    def drop(self, key: str) -> None:
        """Forgets an adapter. torch frees a pinned buffer only when the copies out of it have ended."""
        extent = self._entries.pop(key, None)
        if extent is not None:
            self._nbytes -= self._taken(extent)

    def keep_only(self, keys: Collection[str]) -> None:
        """Forgets every adapter but these."""
        for key in [key for key in self._entries if key not in keys]:
            self.drop(key)

    def _make_room(self, nbytes: int) -> bool:
        """Forgets what was used longest ago until so many bytes are free; if they cannot be, nothing."""
        idle = [key for key, extent in self._entries.items() if not extent.busy]
        if nbytes > self.limit - self._nbytes + sum(self._taken(self._entries[key]) for key in idle):
            return False
        for key in idle:
            if self._nbytes + nbytes <= self.limit:
                break
            self.drop(key)
        return True

    def _taken(self, extent: HostExtent) -> int:
        """The buffer's bytes; torch's allocator of pinned memory takes the next power of two."""
        nbytes = extent.buffer.numel()
        return 1 << (nbytes - 1).bit_length() if self.pinned and nbytes else nbytes


def _fill(buffer: torch.Tensor, source: Extent | ExtentReader, dtype: torch.dtype) -> None:
    """Writes an adapter into a flat buffer of just its size, A and B in `dtype`."""
    if isinstance(source, ExtentReader):
        straight = source.dtype == dtype
        extent = source.read_into(buffer if straight else torch.empty(source.nbytes, dtype=torch.uint8, device="cpu"))
        assert extent.layout == source.layout, "what was read is what was announced"
        if straight:
            return
        source = extent
    target = Extent.of_bytes(source.layout, dtype, buffer)
    target.weights.copy_(source.weights)
    target.vectors.copy_(source.vectors)
