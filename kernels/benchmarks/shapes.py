"""What is measured: the linear modules of a Llama-2-7B layer, with random weights and adapters, and a batch of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakit_kernels.entries import entry
from lorakit_kernels.limits import RANKS
from lorakit_kernels.plan import plan

DTYPE = torch.bfloat16
SCALE = 0.5


@dataclass(frozen=True)
class Shape:
    """Sibling modules: they share x, so one launch serves them all."""

    name: str
    in_features: int
    outs: tuple[int, ...]

    def bytes(self, ranks: Sequence[int]) -> int:
        """Bytes of A and B of adapters of these ranks."""
        return sum(ranks) * sum(self.in_features + out for out in self.outs) * DTYPE.itemsize


LAYER = (
    Shape("qkv", 4096, (4096, 4096, 4096)),
    Shape("o", 4096, (4096,)),
    Shape("gate/up", 4096, (11008, 11008)),
    Shape("down", 11008, (4096,)),
)


class Group:
    """A shape's base weights, adapters and address table.

    Attributes:
        shape: the shape.
        ranks: the rank of each adapter, which is its slot in the table.
        weights: the base's weights, (out, in), one a sibling; none without a base.
        stacked_a: all adapters' A, one under the other, (sum of ranks, in), one a sibling.
        stacked_b: all adapters' B transposed, (sum of ranks, out), one a sibling.
        table: what the kernels read the adapters' addresses from.
        columns: the siblings' places in the table.
        max_rank: the room for ranks in shrink's result.
    """

    def __init__(
        self,
        shape: Shape,
        ranks: Sequence[int],
        device: torch.device | str = "cuda",
        *,
        base: bool = True,
        max_rank: int = 0,
    ) -> None:
        def random(rows: int, columns: int, scale: float) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=DTYPE).mul_(scale)

        self.shape = shape
        self.ranks = list(ranks)
        small = shape.in_features**-0.5
        self.weights = [random(out, shape.in_features, small) for out in shape.outs] if base else []
        self.stacked_a = [random(sum(ranks), shape.in_features, small) for _ in shape.outs]
        self.stacked_b = [random(sum(ranks), out, 1.0) for out in shape.outs]
        words = [
            [entry(self.a(i, slot), self.b(i, slot), SCALE, None, None) for i in range(len(shape.outs))]
            for slot in range(len(ranks))
        ]
        self.table = torch.tensor(words, dtype=torch.int64, device=device)
        self.columns = list(range(len(shape.outs)))
        self.max_rank = -(-max(*ranks, max_rank, 1) // RANKS) * RANKS

    def a(self, sibling: int, slot: int) -> Tensor:
        """An adapter's A, (r, in), at an address that is a multiple of 16."""
        return self._rows(self.stacked_a[sibling], slot)

    def b(self, sibling: int, slot: int) -> Tensor:
        """An adapter's B transposed, (r, out), at an address that is a multiple of 16."""
        return self._rows(self.stacked_b[sibling], slot)

    def batched_a(self, sibling: int) -> Tensor:
        """(adapters, r, in), where all ranks are the same."""
        return self.stacked_a[sibling].view(len(self.ranks), self.ranks[0], -1)

    def batched_b(self, sibling: int) -> Tensor:
        """(adapters, r, out), where all ranks are the same."""
        return self.stacked_b[sibling].view(len(self.ranks), self.ranks[0], -1)

    @cached_property
    def out_first_b(self) -> list[Tensor]:
        """Copies of B as others lay it out, (adapters, out, r), one a sibling."""
        return [self.batched_b(i).transpose(1, 2).contiguous() for i in self.columns]

    def products(self, x: Tensor) -> list[Tensor]:
        """What the base's modules return."""
        return [linear(x, weight) for weight in self.weights]

    def _rows(self, stacked: Tensor, slot: int) -> Tensor:
        first = sum(self.ranks[:slot])
        return stacked[first : first + self.ranks[slot]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows, each with an adapter and with as many tokens as every other row. All is on the device before timing starts.

    Attributes:
        slots: the adapter of each row.
        tokens_per_row: the tokens a row brings, which lie together.
        device: where the batch lies.
    """

    slots: tuple[int, ...]
    tokens_per_row: int = 1
    device: torch.device | str = "cuda"

    @property
    def tokens(self) -> int:
        return len(self.slots) * self.tokens_per_row

    @cached_property
    def slots_tensor(self) -> Tensor:
        """(rows,) int64."""
        return torch.tensor(self.slots, dtype=torch.int64, device=self.device)

    @cached_property
    def plan(self) -> Tensor:
        """What the kernels read the rows' slots from."""
        return plan(self.slots_tensor)

    @cached_property
    def segments(self) -> list[tuple[int, Tensor]]:
        """(slot, its tokens) for every slot in use, in the order of slots."""
        tokens = torch.arange(self.tokens, device=self.device).view(len(self.slots), -1)
        return [
            (slot, tokens[torch.tensor([i for i, other in enumerate(self.slots) if other == slot])].flatten())
            for slot in sorted(set(self.slots))
        ]

    @cached_property
    def order(self) -> Tensor | None:
        """The tokens, sorted by slot; None where they are already."""
        if list(self.slots) == sorted(self.slots):
            return None
        return torch.cat([tokens for _, tokens in self.segments])

    @cached_property
    def ends(self) -> Tensor:
        """(adapters up to the last in use,) int32: where each one's tokens end, when tokens are sorted by slot."""
        counts = [self.slots.count(slot) * self.tokens_per_row for slot in range(max(self.slots) + 1)]
        return torch.tensor(counts, device=self.device).cumsum(0).to(torch.int32)

    def x(self, in_features: int) -> Tensor:
        """Random activations, (tokens, in)."""
        return torch.randn(self.tokens, in_features, device=self.device, dtype=DTYPE)


def layer(ranks: Sequence[int], *, base: bool = True, max_rank: int = 0) -> list[Group]:
    """The groups of one layer, on the GPU."""
    return [Group(shape, ranks, base=base, max_rank=max_rank) for shape in LAYER]


def layer_xs(batch: Batch) -> list[Tensor]:
    """The activations that each group of a layer takes."""
    return [batch.x(shape.in_features) for shape in LAYER]
