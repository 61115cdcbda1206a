"""An adapter's bytes as they lie in a shard, a block at a time.

A tensor is checked while it is in the processor's cache, and no more than a few blocks of an adapter are ever held
twice.

Knows entries and forms; knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy
import torch

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.finite import are_finite
from lorakit.adapters.form import WEIGHTS, AdapterForm
from lorakit.adapters.layout import StoredTensor, stored

BLOCK_BYTES = 1 << 21
"""A block is no larger than this."""

_ALIGNMENT = 64  # Tensors lie in a block's buffer as they do in the range, to this many bytes.
_PIECE_BYTES = 1 << 19  # Transposed at a time: they stay in the processor's own cache.
_RUN_BYTES = 1 << 19  # Checked at a time, while they are still there.

_NUMBERS = {size: numpy.dtype(f"i{size}") for size in (1, 2, 4, 8)}

Buffer = Callable[[int], torch.Tensor]
"""Gives a uint8 buffer of at least so many bytes; it belongs to the block that is yielded next."""


def _fresh(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def blocks(entry: AdapterEntry, form: AdapterForm, buffer: Buffer = _fresh) -> Iterator[memoryview]:
    """The bytes of an adapter's range, in order.

    Args:
        entry: the adapter, with the form's layout and extras.
        form: its tensors; they must not change meanwhile.
        buffer: gives the memory of the blocks.

    Yields:
        Whole tensors and the gaps between them, as uint8; parts of a tensor that is larger than a block.

    Raises:
        NonFiniteWeightsError: A, B, w, c or d holds NaN or Inf; before the block that it lies in.
    """
    sources = _Sources(entry, form)
    room = -(-BLOCK_BYTES // _ALIGNMENT) * _ALIGNMENT
    for places in _grouped(entry.places(), room):
        begin, end = places[0].begin, places[-1].end
        lead = begin % _ALIGNMENT
        if end - begin > room:
            data = numpy.empty(end - begin, numpy.uint8)
        else:
            data = buffer(min(room, entry.stored_nbytes) + _ALIGNMENT).numpy()[lead : lead + end - begin]
        # All views first: what is copied leaves nothing of Python's in the processor's caches.
        copies = [(place.end, data[place.begin - begin : place.end - begin], sources.of(place)) for place in places]
        checked = begin
        for last, target, source in copies:
            _copy(target, source)
            if last - checked >= _RUN_BYTES or last == end:
                _check(entry, form, data[checked - begin : last - begin], checked)
                checked = last
        for first in range(0, end - begin, room):
            yield data[first : first + room].data


def cut(data: torch.Tensor) -> Iterator[memoryview]:
    """Blocks of bytes that are packed already.

    Args:
        data: (n,) uint8 on the CPU.
    """
    view = data.numpy().data
    for first in range(0, view.nbytes, BLOCK_BYTES):
        yield view[first : first + BLOCK_BYTES]


def _grouped(places: Iterable[StoredTensor], room: int) -> Iterator[list[StoredTensor]]:
    """Tensors of a block, one block after another: no more bytes than there is room for, or a single larger one."""
    group: list[StoredTensor] = []
    for place in places:
        if group and place.end - group[0].begin > room:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


class _Sources:
    """An adapter's tensors as they are to lie in its range."""

    def __init__(self, entry: AdapterEntry, form: AdapterForm) -> None:
        self._modules = form.modules
        self._dtype = entry.dtype
        self._extras = {f"extras/{extra.name}": form.extras[extra.name] for extra in entry.extras}
        self._arrays = _Arrays()

    def of(self, place: StoredTensor) -> numpy.ndarray:
        """The numbers of a tensor, or the zeros of a gap; a view where no cast is needed."""
        if place.is_gap:
            return numpy.zeros(place.shape, numpy.uint8)
        if place.name in self._extras:
            return self._arrays.of(self._extras[place.name])
        path, item = place.name.rsplit("/", 1)
        tensor: torch.Tensor = getattr(self._modules[path], item)
        dtype = self._dtype if item in WEIGHTS else torch.float32
        return stored(item, self._arrays.of(tensor if tensor.dtype == dtype else tensor.to(dtype)))


class _Arrays:
    """Tensors' numbers for numpy, as whole ones of their size: it does not know bfloat16.

    Numpy works in the thread that asks, and keeps Python's lock where it makes a view. Torch would start threads of its
    own and give the lock away at each call, so it is asked once a storage: a checkpoint's tensors mostly share one.
    """

    def __init__(self) -> None:
        self._storages: dict[tuple[int, int], numpy.ndarray] = {}

    def of(self, tensor: torch.Tensor) -> numpy.ndarray:
        """A view of a tensor; of one that is on another device, of a copy."""
        if not tensor.is_cpu:
            tensor = tensor.cpu()
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        whole = self._storages.get(key)
        if whole is None:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if whole.nbytes > tensor.nbytes:  # of one tensor alone, it is not asked for again
                self._storages[key] = whole
        size = tensor.element_size()
        place = size * tensor.storage_offset()
        if tensor.is_contiguous():
            return numpy.ndarray(tensor.shape, _NUMBERS[size], whole, place)
        return numpy.ndarray(tensor.shape, _NUMBERS[size], whole, place, [size * step for step in tensor.stride()])


def _check(entry: AdapterEntry, form: AdapterForm, data: numpy.ndarray, begin: int) -> None:
    """Refuses NaN and Inf among bytes of the range, from a place on: many tensors at a time cost less than each."""
    end, weights = begin + len(data), entry.layout.weights_elements * entry.dtype.itemsize
    for first, last, dtype in ((0, weights, entry.dtype), (weights, entry.nbytes, torch.float32)):
        first, last = max(first, begin), min(last, end)
        if first < last and not are_finite(data[first - begin : last - begin], dtype):
            form.check_finite(entry.name)  # says which tensor


def _copy(target: numpy.ndarray, source: numpy.ndarray) -> None:
    """Copies an array into as many bytes, in row-major order."""
    assert target.nbytes == source.nbytes
    to = target.view(source.dtype).reshape(source.shape)
    if source.ndim == 2 and source.size and not source.flags.c_contiguous:
        step = max(1, _PIECE_BYTES // (len(source) * source.itemsize))
        for first in range(0, source.shape[1], step):
            numpy.copyto(to[:, first : first + step], source[:, first : first + step])
    else:
        numpy.copyto(to, source)
