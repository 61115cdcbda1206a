"""An adapter's bytes as they lie in a shard, a block at a time.

A block is packed and checked while it is in the processor's cache, and no more than a few blocks of an adapter are ever
held twice.

Knows entries and forms; knows no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.finite import is_finite
from lorakit.adapters.form import WEIGHTS, AdapterForm
from lorakit.adapters.layout import stored

BLOCK_BYTES = 1 << 21
"""A block is no larger than this."""

_ALIGNMENT = 64  # Tensors lie in a block's buffer as they do in the range, to this many bytes.
_PIECE_BYTES = 1 << 17  # Transposed at a time: they stay in the innermost caches.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16.

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
    room = -(-BLOCK_BYTES // _ALIGNMENT) * _ALIGNMENT  # so that a part of a tensor ends with an element
    nbytes = min(room, entry.stored_nbytes) + _ALIGNMENT
    held = buffer(nbytes)
    data = held.numpy()
    begin = end = 0

    def block() -> memoryview:
        if not _is_finite(entry, held, begin, end):
            form.check_finite(entry.name)  # says which tensor
        lead = begin % _ALIGNMENT
        return data[lead : lead + end - begin].data

    for place in entry.tensors():
        if place.end - begin > room and end > begin:
            yield block()
            held = buffer(nbytes)
            data = held.numpy()
            begin = end
        start = place.begin - begin + begin % _ALIGNMENT
        size = place.end - place.begin
        name = place.name[prefix:]
        if name.startswith("~"):
            data[start : start + size] = 0
        else:
            source = _source(entry, form, extras, name)
            if size > room:
                # In parts, for which it must lie in order.
                whole = _in_order(source)
                for first in range(0, size, room):
                    begin, end = place.begin + first, min(place.begin + first + room, place.end)
                    lead = begin % _ALIGNMENT
                    data[lead : lead + end - begin] = whole[first : first + end - begin]
                    yield block()
                    held = buffer(nbytes)
                    data = held.numpy()
                begin = end
            elif size:
                _copy(data[start : start + size].view(source.dtype).reshape(source.shape), source)
        end = place.end
    if end > begin:
        yield block()


def cut(data: torch.Tensor) -> Iterator[memoryview]:
    """Blocks of bytes that are packed already.

    Args:
        data: (n,) uint8 on the CPU.
    """
    view = data.numpy().data
    for first in range(0, view.nbytes, BLOCK_BYTES):
        yield view[first : first + BLOCK_BYTES]


def _source(entry: AdapterEntry, form: AdapterForm, extras: dict[str, torch.Tensor], name: str) -> numpy.ndarray:
    """A tensor as it lies in the range, in whole numbers of its elements' size."""
    tensor = extras.get(name)
    if tensor is None:
        path, item = name.rsplit("/", 1)
        tensor = stored(item, getattr(form.modules[path], item))
        dtype = entry.dtype if item in WEIGHTS else torch.float32
        tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    # In numpy, which works in the thread that asks: torch would start threads of its own.
    array: numpy.ndarray = tensor.detach().cpu().view(_WHOLE[tensor.element_size()]).numpy()
    return array


def _in_order(source: numpy.ndarray) -> numpy.ndarray:
    """A tensor's bytes in row-major order; a copy where they are not."""
    if not source.flags.c_contiguous:
        turned = numpy.empty(source.shape, source.dtype)
        _copy(turned, source)
        source = turned
    return source.reshape(-1).view(numpy.uint8)


def _copy(target: numpy.ndarray, source: numpy.ndarray) -> None:
    if source.ndim == 2 and not source.flags.c_contiguous:
        step = max(1, _PIECE_BYTES // (len(source) * source.itemsize))
        for first in range(0, source.shape[1], step):
            numpy.copyto(target[:, first : first + step], source[:, first : first + step])
    else:
        numpy.copyto(target, source)


def _is_finite(entry: AdapterEntry, buffer: torch.Tensor, begin: int, end: int) -> bool:
    """Whether what a buffer holds of an adapter's extent is finite: the bytes from `begin` to `end` of its range."""
    cut = entry.layout.weights_elements * entry.dtype.itemsize
    base = begin - begin % _ALIGNMENT
    for first, last, dtype in ((0, cut, entry.dtype), (cut, entry.nbytes, torch.float32)):
        # Gaps may be cut anywhere, and tensors are not: rounded to elements, only a gap's zeros are left out.
        low = -(-max(begin, first) // dtype.itemsize) * dtype.itemsize - base
        high = min(end, last) // dtype.itemsize * dtype.itemsize - base
        if low < high and not is_finite(buffer[low:high].view(dtype)):
            return False
    return True
