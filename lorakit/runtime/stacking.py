"""Stacking: a batch whose factors are stacked when it is formed, if not before; the forward then only multiplies.

The path for the CPU, for any device without kernels, and wherever gradients are wanted: plain torch all through. Knows
slots, rows and where a module computes; no name and no request.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorakit.runtime.experts import AdaptedParameter, Pairs
from lorakit.runtime.factors import Factors, FactorStacks, Likeness, likeness_of
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
        self, rows: Rows, modules: Mapping[str, AdaptedModule | AdaptedParameter], factors: FactorStacks
    ) -> None:
        """Stacks the factors that are not stacked yet.

        Args:
            rows: the rows, and the slot of each.
            modules: path → the module or parameter, for every path that a slot touches.
            factors: of the forward, in its compute dtype, at least fp32: the adapters' share is computed and added in
                it.
        """
        self.rows = rows
        self.paths: Collection[str] = rows.touched
        self.added = AddedTokens(rows, modules)
        self._segments = segments = segments_of(rows.slots)
        self._dtype = factors.dtype
        stacker = _Stacker(len(rows.slots), factors)
        # The factors of experts are not stacked: a token takes few of them.
        served = {path: module for path in self.paths if isinstance(module := modules[path], AdaptedModule)}
        self._stacks: Mapping[str, tuple[Stack, ...]] = {
            path: tuple(stacker.stacks(segments, module)) for path, module in served.items()
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


def _groups(segments: Sequence[Segment], path: str) -> dict[Likeness, list[list[Segment]]]:
    """Groups the segments that one batched product can take, by what they have in common.

    Row counts within a factor of two: a group's short segments are padded to its longest, so padding never doubles the
    work, and a batch of any skew makes few groups.
    """
    groups: dict[Likeness, dict[int, list[Segment]]] = defaultdict(lambda: defaultdict(list))
    for segment in segments:
        module = segment.slot.modules.get(path)
        likeness = None if module is None else likeness_of(module)
        if likeness is not None:
            groups[likeness][(len(segment.rows) - 1).bit_length()].append(segment)
    return {likeness: list(sizes.values()) for likeness, sizes in groups.items()}


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges (first, after the last) of places that cover these, which ascend, and at most as many others."""
    first = after = places[0]
    count = 0
    for place in places:
        if place + 1 - first > 2 * (count + 1):
            yield first, after
            first, count = place, 0
        after, count = place + 1, count + 1
    yield first, after


class _Stacker:
    """Stacks groups of one batch; modules that group alike share their indices."""

    def __init__(self, n: int, factors: FactorStacks) -> None:
        self._n = n
        self._factors = factors
        self._indices: dict[object, tuple[torch.Tensor | None, ...]] = {}

    def stacks(self, segments: Sequence[Segment], module: AdaptedModule) -> Iterator[Stack]:
        """The stacks at one module, on the module's device."""
        for likeness, groups in _groups(segments, module.path).items():
            factors = self._factors.of(module, likeness, [segment.slot for group in groups for segment in group])
            for group in groups:
                rows = {factors.places[segment.slot]: segment.rows for segment in group}
                # The same in all runs: how a product is computed may depend on its shape.
                longest = max(map(len, rows.values()))
                for first, after in _runs(sorted(rows)):
                    members = tuple(rows.get(place, ()) for place in range(first, after))
                    yield self._stack(factors, slice(first, after), members, longest, module.device)

    def _stack(
        self, factors: Factors, places: slice, rows: tuple[tuple[int, ...], ...], longest: int, device: torch.device
    ) -> Stack:
        key = rows, longest, device
        if key not in self._indices:
            self._indices[key] = _index(rows, longest, self._n, device)
        index, keep, target = self._indices[key]
        a, b, c, d = (
            None if tensor is None else tensor[places] for tensor in (factors.a, factors.b, factors.c, factors.d)
        )
        return Stack(n=self._n, index=index, keep=keep, target=target, a=a, b=b, c=c, d=d)

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


def _index(
    rows: Sequence[Sequence[int]], longest: int, n: int, device: torch.device
) -> tuple[torch.Tensor | None, ...]:
    """`Stack.index`, `keep` and `target` for the rows of each segment, none for factors that are not used."""
    padded = [(*members, *[members[0] if members else 0] * (longest - len(members))) for members in rows]
    index = [row for members in padded for row in members]
    if all(rows) and index == list(range(n)):
        return None, None, None
    keep = [i * longest + j for i, members in enumerate(rows) for j in range(len(members))]

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return tensor(index), None if len(keep) == len(index) else tensor(keep), tensor([index[i] for i in keep])
