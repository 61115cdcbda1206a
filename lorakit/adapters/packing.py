"""An adapter's bytes as they lie in a shard, a block at a time.

A tensor is checked while it is in the processor's cache, and no more than a few blocks of an adapter are ever held
twice.

Knows entries and forms; knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy
import torch

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.finite import are_finite
from lorakit.adapters.form import WEIGHTS, AdapterForm
from lorakit.adapters.layout import stored

BLOCK_BYTES = 1 << 21
"""A block is no larger than this."""

_ALIGNMENT = 64  # Tensors lie in a block's buffer as they do in the range, to this many bytes.
_PIECE_BYTES = 1 << 17  # Transposed at a time: they stay in the innermost caches.

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
    prefix = len(entry.name) + 1
    extras = {f"extras/{extra.name}": form.extras[extra.name] for extra in entry.extras}
    arrays = _Arrays()
    room = -(-BLOCK_BYTES // _ALIGNMENT) * _ALIGNMENT
    nbytes = min(room, entry.stored_nbytes) + _ALIGNMENT
    data = buffer(nbytes).numpy()
    begin = end = 0
    for place in entry.tensors():
        if place.end - begin > room and end > begin:
            yield _part(data, begin, end)
            data = buffer(nbytes).numpy()
            begin = end
        name, size = place.name[prefix:], place.end - place.begin
        if size > room:
            whole = numpy.empty(size, numpy.uint8)
            _fill(whole, entry, form, extras, arrays, name)
            for first in range(0, size, room):
                yield whole[first : first + room].data
            data = buffer(nbytes).numpy()  # the one before went with the first part
            begin = place.end
        else:
            lead = begin % _ALIGNMENT - begin
            _fill(data[lead + place.begin : lead + place.end], entry, form, extras, arrays, name)
        end = place.end
    if end > begin:
        yield _part(data, begin, end)


def cut(data: torch.Tensor) -> Iterator[memoryview]:
    """Blocks of bytes that are packed already.

    Args:
        data: (n,) uint8 on the CPU.
    """
    view = data.numpy().data
    for first in range(0, view.nbytes, BLOCK_BYTES):
        yield view[first : first + BLOCK_BYTES]


class _Arrays:
    """Tensors' numbers for numpy, as whole ones of their size: it does not know bfloat16.

    Numpy works in the thread that asks, and keeps Python's lock where it makes a view. Torch would start threads of its
    own and give the lock away at each call, so it is asked once a storage: a checkpoint's tensors mostly share one.
    """

    def __init__(self) -> None:
        self._storages: dict[int, numpy.ndarray] = {}

    def of(self, tensor: torch.Tensor) -> numpy.ndarray:
        """A view of a tensor; of one that is on another device, of a copy."""
        if not tensor.is_cpu:
            tensor = tensor.cpu()
        storage = tensor.untyped_storage()
        whole = self._storages.get(storage.data_ptr())
        if whole is None or whole.nbytes != storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            if whole.nbytes > tensor.nbytes:  # of one tensor alone, it is not asked for again
                self._storages[storage.data_ptr()] = whole
        size = tensor.element_size()
        strides = [size * step for step in tensor.stride()]
        return numpy.ndarray(tensor.shape, f"i{size}", whole, size * tensor.storage_offset(), strides)


def _part(data: numpy.ndarray, begin: int, end: int) -> memoryview:
    lead = begin % _ALIGNMENT
    return data[lead : lead + end - begin].data


def _fill(
    target: numpy.ndarray,
    entry: AdapterEntry,
    form: AdapterForm,
    extras: Mapping[str, torch.Tensor],
    arrays: _Arrays,
    name: str,
) -> None:
    """Copies a tensor into its bytes, in row-major order, and checks it."""
    if name.startswith("~"):
        target[:] = 0
    elif name in extras:
        _copy(target, arrays.of(extras[name]))
    else:
        path, item = name.rsplit("/", 1)
        dtype = entry.dtype if item in WEIGHTS else torch.float32
        tensor: torch.Tensor = getattr(form.modules[path], item)
        array = arrays.of(tensor if tensor.dtype == dtype else tensor.to(dtype))
        copied = _copy(target, stored(item, array))
        if not are_finite(copied, dtype):
            form.check_finite(entry.name)  # says which tensor


def _copy(target: numpy.ndarray, source: numpy.ndarray) -> numpy.ndarray:
    """Copies an array into as many bytes; gives them in the array's shape."""
    assert target.nbytes == source.nbytes
    to = target.view(source.dtype).reshape(source.shape)
    if source.ndim == 2 and source.size and not source.flags.c_contiguous:
        step = max(1, _PIECE_BYTES // (len(source) * source.itemsize))
        for first in range(0, source.shape[1], step):
            numpy.copyto(to[:, first : first + step], source[:, first : first + step])
    else:
        numpy.copyto(to, source)
    return to
