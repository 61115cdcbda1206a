"""An adapter's bytes as they lie in a shard, a block at a time.

A block is packed, checked, hashed and written while it is in the processor's cache, so that an adapter makes one trip
through memory, and no more than a block of it is ever held twice.

Knows entries and forms; knows no file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.finite import is_finite
from lorakit.adapters.form import WEIGHTS, AdapterForm
from lorakit.adapters.layout import stored

BLOCK_BYTES = 1 << 18
"""A block is about this large, and larger only where a single tensor is."""

_ALIGNMENT = 64  # Tensors lie in a block's buffer as they do in the range, to this many bytes.
_PIECE = 1 << 15  # Elements transposed at a time: they stay in the innermost caches.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16.


def blocks(entry: AdapterEntry, form: AdapterForm) -> Iterator[memoryview]:
    """The bytes of an adapter's range, in order.

    Args:
        entry: the adapter, with the form's layout and extras.
        form: its tensors; they must not change meanwhile.

    Yields:
        Whole tensors and the gaps between them, as uint8. A block is overwritten when the next is asked for.

    Raises:
        NonFiniteWeightsError: A, B, w, c or d holds NaN or Inf; before the block that it lies in.
    """
    prefix = len(entry.name) + 1
    extras = {f"extras/{extra.name}": form.extras[extra.name] for extra in entry.extras}
    places = list(entry.tensors())
    largest = max((place.end - place.begin for place in places), default=0)
    room = min(max(BLOCK_BYTES, largest), entry.stored_nbytes)
    buffer = torch.empty(room + _ALIGNMENT, dtype=torch.uint8)
    begin = end = 0

    def block() -> memoryview:
        if not _is_finite(entry, buffer, begin, end):
            form.check_finite(entry.name)  # says which tensor
        lead = begin % _ALIGNMENT
        return buffer[lead : lead + end - begin].numpy().data

    for place in places:
        if place.end - begin > room:
            yield block()
            begin = end
        end = place.end
        start = place.begin - begin + begin % _ALIGNMENT
        target = buffer[start : start + place.end - place.begin]
        name = place.name[prefix:]
        if name.startswith("~"):
            target.zero_()
        elif name in extras:
            _copy(target, extras[name])
        else:
            path, item = name.rsplit("/", 1)
            source = stored(item, getattr(form.modules[path], item))
            _copy(target, source.to(entry.dtype if item in WEIGHTS else torch.float32))
    if end > begin:
        yield block()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a tensor into as many bytes, in row-major order."""
    source = source.detach().cpu()
    assert target.numel() == source.numel() * source.element_size()
    if not source.numel():
        return
    # By numpy, which works in the thread that asks: torch would start threads of its own beside the writers'.
    whole = _WHOLE[source.element_size()]
    to, of = target.view(whole).view(source.shape).numpy(), source.view(whole).numpy()
    if source.dim() == 2 and not source.is_contiguous():
        step = max(1, _PIECE // len(to))
        for first in range(0, to.shape[1], step):
            numpy.copyto(to[:, first : first + step], of[:, first : first + step])
    else:
        numpy.copyto(to, of)


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
