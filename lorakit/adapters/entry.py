"""What a bank's index says of one adapter.

Knows names, shapes and byte ranges; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch

from lorakit.adapters.dtypes import SAFETENSORS_CODES
from lorakit.adapters.layout import Layout, Span

EXTRA_ALIGNMENT = 16
"""Extras start at a multiple of this many bytes from the adapter's first: enough for every dtype."""


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor of the checkpoint that serving does not need, kept for giving the checkpoint back.

    Attributes:
        name: its PEFT key.
        dtype: any that safetensors can hold.
        shape: its shape.
        offset: its first byte, counted from the adapter's first byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte after its last, counted like `offset`."""
        return self.offset + self.nbytes


def place_extras(tensors: Mapping[str, torch.Tensor], start: int) -> tuple[ExtraTensor, ...]:
    """Lays extras one after another, sorted by name.

    Args:
        tensors: PEFT key → tensor.
        start: the byte at which the adapter's extent ends.
    """
    extras = []
    for name in sorted(tensors):
        offset = -(-start // EXTRA_ALIGNMENT) * EXTRA_ALIGNMENT
        extras.append(ExtraTensor(name, tensors[name].dtype, tuple(tensors[name].shape), offset))
        start = extras[-1].end
    return tuple(extras)


class StoredTensor(NamedTuple):
    """One tensor as a shard's header has it.

    Attributes:
        name: its name in the shard.
        code: safetensors' code of its dtype.
        shape: its shape.
        begin: its first byte, counted from the adapter's first byte.
        end: the byte after its last.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of a bank.

    Attributes:
        name: its name.
        method: the PEFT method's short name ("lora", "dora", …).
        layout: where its tensors lie; shared by adapters of one recipe.
        config: its adapter_config.json; shared likewise, so not to be changed.
        dtype: of A and B.
        extras: the checkpoint's tensors that serving does not need, behind the extent.
        source: where it came from, as given when it was added.
        uses_base_weights: the form was computed from the base's weights and is right for that base only.
        base_quantisation: how those weights were quantised, as `AdapterForm` has it.
        svd_errors: module path → ‖ΔW − B A‖_F / ‖ΔW‖_F to four digits, of the modules whose change ΔW of the weight was
            approximated by SVD, before any cast of A and B; the others are exact.
        task_id: the task that was chosen, of a method that has several; None otherwise.
        shard: the file that holds it.
        offset: its first byte in that file.
        blake3: the hash of its whole range, extent and extras, in hexadecimal.
    """

    name: str
    method: str
    layout: Layout
    config: Mapping[str, Any]
    dtype: torch.dtype
    extras: tuple[ExtraTensor, ...] = ()
    source: str = ""
    uses_base_weights: bool = False
    base_quantisation: str = ""
    svd_errors: Mapping[str, float] = field(default_factory=dict)
    task_id: int | None = None
    shard: str = ""
    offset: int = 0
    blake3: str = ""

    @property
    def nbytes(self) -> int:
        """The extent's bytes: what loading reads and what a slot holds."""
        return self.layout.nbytes(self.dtype)

    @property
    def stored_nbytes(self) -> int:
        """The bytes it takes in its shard: the extent and the extras."""
        return max(self.nbytes, self.extras[-1].end) if self.extras else self.nbytes

    @property
    def rank(self) -> int:
        """The largest rank among its modules."""
        return self.layout.ranks[-1]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks of its modules, ascending."""
        return self.layout.ranks

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of its modules."""
        return tuple(module.path for module in self.layout.modules)

    @property
    def svd_error(self) -> float:
        """The largest of `svd_errors`; 0 for an adapter that is exact."""
        return max(self.svd_errors.values(), default=0.0)

    @property
    def parameters(self) -> int:
        """The number of elements of its A, B, c and d."""
        return self.layout.parameters

    def tensors(self) -> Iterator[StoredTensor]:
        """Its tensors as they lie in the shard, without a hole: a safetensors file may have none, so the gaps that
        align tensors are tensors too.
        """
        place = 0
        gaps = 0
        for stored in self._tensors():
            if stored.begin > place:
                yield StoredTensor(f"{self.name}/~pad{gaps}", "U8", (stored.begin - place,), place, stored.begin)
                gaps += 1
            # An empty name only marks a region's end.
            if stored.name:
                yield stored
            place = stored.end

    def _tensors(self) -> Iterator[StoredTensor]:
        def region(spans: Iterable[Span], start: int, elements: int, dtype: torch.dtype) -> Iterator[StoredTensor]:
            size, code = dtype.itemsize, SAFETENSORS_CODES[dtype]
            for path, item, offset, shape in spans:
                begin = start + offset * size
                yield StoredTensor(f"{self.name}/{path}/{item}", code, shape, begin, begin + prod(shape) * size)
            end = start + elements * size
            yield StoredTensor("", "", (), end, end)

        layout = self.layout
        cut = layout.weights_elements * self.dtype.itemsize
        yield from region(layout.weight_spans, 0, layout.weights_elements, self.dtype)
        yield from region(layout.vector_spans, cut, layout.vector_elements, torch.float32)
        for extra in self.extras:
            code = SAFETENSORS_CODES[extra.dtype]
            yield StoredTensor(f"{self.name}/extras/{extra.name}", code, extra.shape, extra.offset, extra.end)
