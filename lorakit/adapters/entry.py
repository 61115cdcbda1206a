"""What a bank's index says of one adapter.

Knows names, shapes and byte ranges; opens no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from lorakit.adapters.dtypes import SAFETENSORS_CODES
from lorakit.adapters.layout import Layout, StoredTensor, with_gaps

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

    def places(self) -> Sequence[StoredTensor]:
        """Its tensors as they lie in the shard, without a hole (`with_gaps`), by names without its own."""
        own = self.layout.places(self.dtype)
        if not self.extras:
            return own
        extras = [
            StoredTensor(f"extras/{extra.name}", SAFETENSORS_CODES[extra.dtype], extra.shape, extra.offset, extra.end)
            for extra in self.extras
        ]
        return [*own, *with_gaps(extras, self.nbytes, sum(place.is_gap for place in own))]

    def tensors(self) -> Iterator[StoredTensor]:
        """Its tensors as they lie in the shard, by the names that they have there."""
        for place in self.places():
            yield place._replace(name=f"{self.name}/{place.name}")
