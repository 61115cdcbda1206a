"""Stacking: a batch whose factors are stacked once, when it is formed; the forward then only multiplies.

The path for the CPU, for any device without kernels, and wherever gradients are wanted: plain torch all through. Knows
slots, rows and where a module computes; no name and no request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorakit.runtime.experts import AdaptedParameter, Pairs
from lorakit.runtime.layers import AdaptedModule
from lorakit.runtime.ops import Stack, Whole, replaced, stacked_lora
from lorakit.runtime.pool import Slot
from lorakit.runtime.rows import Rows
from lorakit.runtime.vocabulary import AddedTokens


@dataclass(frozen=True, eq=False)
class Segment:
    """The rows of a batch that share an adapter."""

    slot: Slot
    rows: tuple[int, ...]


class ExpertSegment(NamedTuple):
    """The pairs of a token and an expert that share an adapter and the expert.

    Attributes:
        slot: the adapter's.
        expert: the expert.
        pairs: (n,) int64, which of the pairs.
    """

    slot: Slot
    expert: int
    pairs: torch.Tensor


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
        rows: the rows, and the slot of each.
        paths: the modules, and parameters of experts, that some row's adapter touches.
        added: the tokens that adapters add to the vocabulary.
    """

    def __init__(
        self, rows: Rows, modules: Mapping[str, AdaptedModule | AdaptedParameter], *, dtype: torch.dtype
    ) -> None:
        """Stacks the factors.

        Args:
            rows: the rows, and the slot of each.
            modules: path → the module or parameter, for every path that a slot touches.
            dtype: the compute dtype of the stacks, at least fp32: the adapters' share is computed and added in it.
        """
        self.rows = rows
        self.paths: Collection[str] = rows.touched
        self.added = AddedTokens(rows, modules)
        self._segments = segments = segments_of(rows.slots)
        self._dtype = dtype
        stacker = _Stacker(len(rows.slots), dtype)
        # The factors of experts are not stacked: a token takes few of them.
        served = {path: module for path in self.paths if isinstance(module := modules[path], AdaptedModule)}
        self._stacks: Mapping[str, tuple[Stack, ...]] = {
            path: tuple(stacker.stack(group, module) for group in _groups(segments, path))
            for path, module in served.items()
        }
        self._wholes: Mapping[str, tuple[Whole, ...]] = {
            path: tuple(
                stacker.whole(segment, module)
                for segment in segments
                if path in segment.slot.modules and segment.slot.modules[path].w is not None
            )
            for path, module in served.items()
        }

    def add(self, module: AdaptedModule, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the adapters' share at a module. See `layers.Batch`."""
        for stack in self._stacks[module.path]:
            y = stacked_lora(y, x, stack, embedding=module.embedding)
        for whole in self._wholes[module.path]:
            y = replaced(y, x, whole, embedding=module.embedding)
        return self.added.widen(module, y, x) if module.path in self.added and not module.embedding else y

    def route(self, pairs: Pairs) -> list[ExpertSegment]:
        """Groups pairs by adapter and expert. See `experts.ExpertsBatch`."""
        rows = torch.full((len(self.rows.slots),), -1)
        for number, segment in enumerate(self._segments):
            rows[list(segment.rows)] = number
        ordered, order = torch.sort(pairs.keys(rows.to(pairs.token.device)), stable=True)
        keys, counts = torch.unique_consecutive(ordered, return_counts=True)
        groups = zip(keys.tolist(), order.split(counts.tolist()), strict=True)
        return [
            ExpertSegment(self._segments[key // pairs.experts].slot, key % pairs.experts, members)
            for key, members in groups
            if key >= 0
        ]

    def add_experts(
        self, parameter: AdaptedParameter, y: torch.Tensor, x: torch.Tensor, routed: list[ExpertSegment]
    ) -> torch.Tensor:
        """Adds the adapters' shares at a parameter of experts. See `experts.ExpertsBatch`."""
        for slot, expert, pairs in routed:
            form = slot.modules.get(parameter.path)
            if form is None or form.a is None or form.b is None:
                continue
            a, b = (factor[expert].to(y.device, self._dtype) for factor in (form.a, form.b))
            share = x.index_select(0, pairs).to(self._dtype) @ a.T @ b.T
            taken = y.index_select(0, pairs).to(self._dtype)
            y = y.index_copy_(0, pairs, taken.add(share, alpha=form.scale).to(y.dtype))
        return y


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
