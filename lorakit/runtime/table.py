"""The address table: for every slot and module, where the kernels find A, B, c, d and w.

A row is a slot's, found by its index; a column is a module's. A row is written when its slot was loaded or moved, from
its layout alone. Knows slots and modules' paths; no batch and no request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy
import torch

from lorakit.adapters.layout import Layout
from lorakit.runtime.experts import AdaptedParameter
from lorakit.runtime.layers import AdaptedModule
from lorakit.runtime.ops import WORDS, entry_words
from lorakit.runtime.pool import Slot

_STRIDES = slice(2, 4)
"""Words of an entry of experts, which have neither c nor d: the bytes from an expert's A, and B, to the next one's."""


class AddressTable:
    """The entries of all slots, one tensor for each dtype of weights: a kernel reads weights of one dtype.

    A slot's row is zeros in the tensors of the other dtypes, and zeros mean: leave the module as it is.

    Attributes:
        version: grows when a tensor was replaced by a larger one.
    """

    def __init__(self, device: torch.device, modules: Mapping[str, AdaptedModule | AdaptedParameter]) -> None:
        """Makes an empty table.

        Args:
            device: where the slots live.
            modules: path → the module or parameter; may grow later.
        """
        self.version = 0
        self._device = device
        self._modules = modules
        self._columns: dict[str, int] = {}
        self._tensors: dict[torch.dtype, torch.Tensor] = {}
        self._written: dict[int, int] = {}
        self._rows: dict[tuple[str, torch.dtype], tuple[numpy.ndarray, numpy.ndarray]] = {}

    def column(self, path: str) -> int:
        """A module's column."""
        if path not in self._columns:
            self._columns[path] = len(self._columns)
            # A module that no adapter touches has a column too, of zeros, if a sibling of its is served.
            for dtype in self._tensors:
                self._make_room(0, dtype)
        return self._columns[path]

    def reserve(self, slots: int, dtypes: Iterable[torch.dtype], paths: Iterable[str]) -> None:
        """Makes room for so many slots of each dtype, and for modules, so that no tensor is replaced until then."""
        for path in paths:
            self.column(path)
        for dtype in dtypes:
            self._make_room(slots, dtype)

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """(slots, modules, 8) int64: the entries of the slots of this dtype. It may be another one after a `write`."""
        return self._tensors[dtype]

    def experts(self, dtype: torch.dtype, columns: Sequence[int], experts: int) -> torch.Tensor:
        """The entries of every expert, made on the device from those of the first.

        Args:
            dtype: of the slots.
            columns: of parameters of experts.
            experts: how many each of them has.

        Returns:
            (slots · experts, columns, 8) int64, the row of a slot's expert being slot · experts + expert.
        """
        first = self._tensors[dtype][:, list(columns)].unsqueeze(1)
        every = first.repeat(1, experts, 1, 1)
        expert = torch.arange(experts, device=self._device).view(-1, 1, 1)
        every[..., :2] += expert * first[..., _STRIDES]
        every[..., _STRIDES] = 0
        return every.flatten(0, 1)

    def write(self, slot: Slot) -> None:
        """Brings a slot's row up to date, in the order of the current stream."""
        if self._written.get(slot.index) == slot.generation and slot.dtype in self._tensors:
            return
        offsets, addressed = self._row(slot.layout, slot.dtype)
        self._make_room(slot.index + 1, slot.dtype)
        row = torch.zeros((self._tensors[slot.dtype].shape[1], WORDS), dtype=torch.int64)
        row.numpy()[: len(offsets)] = offsets + addressed * slot.address
        for dtype, tensor in self._tensors.items():
            if dtype == slot.dtype:
                tensor[slot.index] = row.to(self._device)
            else:
                tensor[slot.index] = 0
        self._written[slot.index] = slot.generation

    def _row(self, layout: Layout, dtype: torch.dtype) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The row of a slot at address 0, (columns, 8), and which of its words are addresses."""
        key = layout.key, dtype
        if key not in self._rows:
            columns = [self.column(module.path) for module in layout.modules]
            words = numpy.zeros((max(columns, default=-1) + 1, WORDS), dtype=numpy.int64)
            addressed = numpy.zeros_like(words)
            vectors = layout.weights_elements * dtype.itemsize
            for column, module in zip(columns, layout.modules, strict=True):
                a, b, w = (0 if at is None else at * dtype.itemsize for at in (module.a, module.b, module.w))
                c, d = (0 if at is None else vectors + at * 4 for at in (module.c, module.d))
                scale = module.scale * self._modules[module.path].output_scale
                words[column] = entry_words(a, b, c, d, module.rank, scale, w)
                addressed[column, :4] = [at is not None for at in (module.a, module.b, module.c, module.d)]
                addressed[column, 6] = module.w is not None
                if module.kind == "experts":
                    widths = module.in_features, module.out_features
                    words[column, _STRIDES] = [module.rank * width * dtype.itemsize for width in widths]
            self._rows[key] = words, addressed
        return self._rows[key]

    def _make_room(self, slots: int, dtype: torch.dtype) -> None:
        """Gives every tensor, and one of this dtype, so many rows and a column for every module known."""
        columns = len(self._columns)
        self._tensors.setdefault(dtype, torch.zeros((0, 0, WORDS), dtype=torch.int64, device=self._device))
        for key, tensor in self._tensors.items():
            if tensor.shape[0] < slots or tensor.shape[1] < columns:
                # Twice as many rows as are needed: few tensors on the way to many slots.
                shape = max(tensor.shape[0], 2 * slots), max(tensor.shape[1], columns), WORDS
                grown = torch.zeros(shape, dtype=torch.int64, device=self._device)
                grown[: tensor.shape[0], : tensor.shape[1]] = tensor
                self._tensors[key] = grown
                self.version += 1
