"""Stacking: a batch whose factors are stacked once, when it is formed; the forward then only multiplies.

The path for the CPU, for any device without kernels, and wherever gradients are wanted: plain torch all through. Knows
slots, rows and where a module computes; no name and no request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorakit.runtime.layers import AdaptedModule
from lorakit.runtime.ops import Stack, Whole, replaced, stacked_lora
from lorakit.runtime.pool import Slot
from lorakit.runtime.vocabulary import AddedTokens


@dataclass(frozen=True, eq=False)
class Segment:
    """The rows of a batch that share an adapter."""

    slot: Slot
    rows: tuple[int, ...]


def segments_of(slots: Sequence[Slot | None]) -> list[Segment]:
    """Groups rows by slot, in order of first appearance; rows of the base (None) are in no segment."""
    rows: dict[int, list[int]] = defaultdict(list)
    by_id = {}
    for row, slot in enumerate(slots):
        if slot is not None:
            rows[id(slot)].append(row)
            by_id[id(slot)] = slot
    return [Segment(by_id[key], tuple(members)) for key, members in rows.items()]


class Stacking:
    """The stacks of a batch, for every module that one of its adapters touches.

    Attributes:
        slots: the slot of each row, None for the base.
        added: the tokens that adapters add to the vocabulary.
    """

    def __init__(
        self, slots: Sequence[Slot | None], modules: Mapping[str, AdaptedModule], *, dtype: torch.dtype
    ) -> None:
        """Stacks the factors.

        Args:
            slots: the slot of each row.
            modules: module path → the module, for every path that a slot touches.
            dtype: the compute dtype of the stacks, at least fp32: the adapters' share is computed and added in it.
        """
        self.slots = tuple(slots)
        self.added = AddedTokens(slots, modules)
        segments = segments_of(slots)
        stacker = _Stacker(len(self.slots), dtype)
        paths = dict.fromkeys(path for segment in segments for path in segment.slot.modules)
        self._stacks: Mapping[str, tuple[Stack, ...]] = {
            path: tuple(stacker.stack(group, modules[path]) for group in _groups(segments, path)) for path in paths
        }
        self._wholes: Mapping[str, tuple[Whole, ...]] = {
            path: tuple(
                stacker.whole(segment, modules[path])
                for segment in segments
                if path in segment.slot.modules and segment.slot.modules[path].w is not None
            )
            for path in paths
        }

    @property
    def paths(self) -> Collection[str]:
        """The modules that some row's adapter touches."""
        return self._stacks.keys()

    def add(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share at a module. See `layers.Batch`."""
        for stack in self._stacks[module.path]:
            y = stacked_lora(y, x, stack, embedding=module.embedding)
        for whole in self._wholes[module.path]:
            y = replaced(y, x, whole, embedding=module.embedding)
        return self.added.widen(module, y, x) if module.path in self.added and not module.embedding else y


def _groups(segments: Sequence[Segment], path: str) -> list[list[Segment]]:
    """Groups the segments that one batched product can take.

    Equal ranks, and row counts within a factor of two: a group's short segments are padded to its longest, so
    padding never doubles the work, and a batch of any skew makes few groups.
    """
    groups: dict[tuple[int, bool, bool, int], list[Segment]] = defaultdict(list)
    for segment in segments:
        module = segment.slot.modules.get(path)
        if module is not None and any(item in "abcd" for item, _ in module.tensors()) and module.w is None:
            size = (len(segment.rows) - 1).bit_length()
            groups[module.rank, module.c is None, module.d is None, size].append(segment)
    return list(groups.values())


class _Stacker:
    """Stacks groups of one batch; modules that group alike share their indices."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        self._n = n
        self._dtype = dtype
        self._indices: dict[object, tuple[torch.Tensor | None, ...]] = {}

    def stack(self, group: Sequence[Segment], module: AdaptedModule) -> Stack:
        """One group's `Stack` at one module, on the module's device."""
        forms = [segment.slot.modules[module.path] for segment in group]
        rows, device = tuple(segment.rows for segment in group), module.device
        if (rows, device) not in self._indices:
            self._indices[rows, device] = _index(rows, self._n, device)
        index, keep, target = self._indices[rows, device]
        # Scaled in the compute dtype: the scale is not rounded to B's.
        b = [
            form.b.to(device, self._dtype).T * (form.scale * module.output_scale)
            for form in forms
            if form.b is not None
        ]
        c, d = self._stacked([form.c for form in forms], device), self._stacked([form.d for form in forms], device)
        return Stack(
            n=self._n,
            index=index,
            keep=keep,
            target=target,
            a=self._stacked([form.a for form in forms], device),
            b=torch.stack(b) if b else None,
            c=None if c is None else c.unsqueeze(1),
            d=None if d is None else d.unsqueeze(1),
        )

    def whole(self, segment: Segment, module: AdaptedModule) -> Whole:
        """A segment's `Whole` at a module, on the module's device."""
        form, rows = segment.slot.modules[module.path], segment.rows
        assert form.w is not None
        return Whole(
            n=self._n,
            rows=None if len(rows) == self._n else torch.tensor(rows, dtype=torch.int64, device=module.device),
            w=form.w.to(module.device),
            d=None if form.d is None else form.d.to(module.device),
            scale=module.output_scale,
        )

    def _stacked(self, tensors: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        assert len(present) in (0, len(tensors)), "a group's modules have the same parts"
        return torch.stack(present).to(device, self._dtype) if present else None


def _index(rows: Sequence[Sequence[int]], n: int, device: torch.device) -> tuple[torch.Tensor | None, ...]:
    """`Stack.index`, `keep` and `target` for the rows of each segment."""
    longest = max(map(len, rows))
    index = [row for members in rows for row in (*members, *[members[0]] * (longest - len(members)))]
    if index == list(range(n)):
        return None, None, None
    keep = [i * longest + j for i, members in enumerate(rows) for j in range(len(members))]

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return tensor(index), None if len(keep) == len(index) else tensor(keep), tensor([index[i] for i in keep])
