"""Batches for the kernels: small ones, with every kind of edge, and walls around all that lies in memory.

Every tensor that kernels read or write lies in a buffer of its own that is NaN before and after it: a product that
reads beyond an edge is NaN, and a write beyond one is found by `Walled.intact`.
"""

from dataclasses import dataclass, replace

import torch

from lorakit_kernels import decode, embedding, prefill
from lorakit_kernels.entries import WORDS, entry
from lorakit_kernels.plan import plan
from lorakit_kernels.reference import Weights, sgmv
from lorakit_kernels.tuning import Decode, tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "bf16 x, fp32 weights": (BF16, FP32),
    "fp16 x, fp32 weights": (FP16, FP32),
    "fp32 x, bf16 weights": (FP32, BF16),
    "bf16 x, fp16 weights": (BF16, FP16),
}
"""Dtypes of x and y, and of the weights."""

# Small, so that small tensors have several tiles and a last one that is not full.
_FALLBACK = tiles(torch.device("cpu"))
SMALL = {
    "decode": replace(_FALLBACK.decode, block_k=256, block_n=64),
    "prefill": replace(_FALLBACK.prefill, block_m=16, block_k=64, block_n=64, split_k=256),
}
"""Path → its tiles."""

_WALL = 64


@dataclass(frozen=True, eq=False)
class Walled:
    """A tensor with NaN before and after it."""

    buffer: torch.Tensor
    tensor: torch.Tensor

    def intact(self):
        return bool(self.buffer[:_WALL].isnan().all() and self.buffer[-_WALL:].isnan().all())


def walled(tensor):
    buffer = tensor.new_full((tensor.numel() + 2 * _WALL,), float("nan"))
    inside = buffer[_WALL:-_WALL].view(tensor.shape)
    inside.copy_(tensor)
    return Walled(buffer, inside)


@dataclass(frozen=True, eq=False)
class Batch:
    """What a module's kernels take, and the weights behind the table's addresses.

    Attributes:
        x: (tokens, in), or (tokens,) ids.
        ys: the base's product, (tokens, out) for each sibling.
        slots: each row's.
        weights: sibling → slot → what lies there.
        table: the address table.
        columns: the siblings' in the table.
        max_rank: as the kernels are told.
        weight: dtype of A and B.
        kept: what must outlive the table.
    """

    x: torch.Tensor
    ys: list
    slots: list
    weights: list
    table: torch.Tensor
    columns: list
    max_rank: int
    weight: torch.dtype
    kept: list

    @property
    def per_row(self):
        return self.x.shape[0] // len(self.slots)

    @property
    def plan(self):
        return plan(torch.tensor(self.slots, device=self.x.device))

    def of(self, tensor, row):
        """A row's tokens."""
        return tensor[row * self.per_row : (row + 1) * self.per_row]

    def rows(self, rows):
        """The batch of some of the rows, in this order; None stands for a row of the base."""
        base = None in rows and next(row for row in rows if row is not None)
        picked = [base if row is None else row for row in rows]
        return replace(
            self,
            x=torch.cat([self.of(self.x, row) for row in picked]),
            ys=[torch.cat([self.of(y, row) for row in picked]) for y in self.ys],
            slots=[-1 if row is None else self.slots[row] for row in rows],
        )

    def exact(self):
        """Each sibling's y in fp64."""
        ids = self.x.ndim == 1
        return [sgmv(y, self.x, self.slots, at, embedding=ids) for y, at in zip(self.ys, self.weights, strict=True)]

    def served(self, row):
        """For each sibling, whether the row's adapter does anything."""
        empty = Weights()
        at = [weights.get(self.slots[row], empty) for weights in self.weights]
        return [bool(w.a is not None or w.c is not None or w.d is not None) for w in at]


def batch(
    device,
    *,
    slots,
    ranks,
    outs,
    in_features=64,
    per_row=1,
    dtypes=(FP32, FP32),
    channels=True,
    max_rank=None,
    vocabulary=None,
    ids=torch.int64,
):
    """Makes a batch of random numbers.

    Args:
        device: where.
        slots: the slot of each row.
        ranks: of each slot: one number for all siblings or one for each; 0 for no factors, None for an empty entry.
        outs: of each sibling.
        in_features: of x.
        per_row: tokens of a row.
        dtypes: of x and y, and of the weights.
        channels: whether some slots have c, some d, some both. Slots of rank 0 have both anyway.
        max_rank: the least that holds all ranks, if not given.
        vocabulary: x is ids below this.
        ids: their dtype.
    """
    dtype, weight = dtypes
    tokens, siblings = len(slots) * per_row, len(outs)
    wide = [rank if isinstance(rank, tuple) else (rank,) * siblings for rank in ranks]
    highest = max([rank or 0 for of_slot in wide for rank in of_slot], default=0)
    kept = []

    def keep(tensor):
        wall = walled(tensor.to(device))
        kept.append(wall)
        return wall.tensor

    # Columns in an order of their own, and between them what no kernel of this batch may read.
    columns = [2 * sibling + 1 for sibling in reversed(range(siblings))]
    nan = torch.full((16, max(in_features, *outs, vocabulary or 0)), float("nan"), dtype=weight, device=device)
    kept.append(nan)
    elsewhere = entry(nan, nan, 1.0, nan.float()[0], nan.float()[0])
    table = torch.tensor(elsewhere).repeat(len(ranks) + 1, 2 * siblings + 1, 1)
    weights = [{} for _ in outs]
    for slot, of_slot in enumerate(wide):
        for sibling, (rank, out) in enumerate(zip(of_slot, outs, strict=True)):
            table[slot, columns[sibling]] = 0
            if rank is None:
                continue
            a = b = c = d = None
            scale = 0.25 + 0.1 * slot
            if rank:
                shape = (rank, in_features) if vocabulary is None else (vocabulary, rank)
                size = in_features**-0.5 if vocabulary is None else 1.0
                a = keep((torch.randn(shape) * size).to(weight))
                b = keep((torch.randn(rank, out) * rank**-0.5).to(weight))
            if (channels and (slot + sibling) % 4 in (1, 3)) or not rank:
                c = keep(torch.rand(out) + 0.5)
            if (channels and (slot + sibling) % 4 in (2, 3)) or not rank:
                d = keep(torch.randn(out))
            weights[sibling][slot] = Weights(a, b, scale, c, d)
            table[slot, columns[sibling]] = torch.tensor(entry(a, b, scale, c, d))
    if vocabulary is None:
        x = keep(torch.randn(tokens, in_features).to(dtype))
    else:
        x = torch.randint(vocabulary, (tokens,), dtype=ids).to(device)
    ys = [torch.randn(tokens, out).to(device, dtype) for out in outs]
    for y in ys:
        y[:, 0] = -0.0  # adding nothing to it would give 0.0
    most = max_rank or max(16, -(-highest // 16) * 16)
    assert table.shape[-1] == WORDS
    return Batch(x, ys, list(slots), weights, table.to(device), columns, most, weight, kept)


def run(batch, tile):
    """Each sibling's y by the kernels: those of decode or prefill, as the tile is. Fails when a wall was touched."""
    module = decode if isinstance(tile, Decode) else prefill
    ids = batch.x.ndim == 1
    tokens, siblings = batch.x.shape[0], len(batch.ys)
    parts = 1 if ids else module.splits(batch.x.shape[1], tile)
    # Made first: kernels may read it before the kernel ahead of them has ended.
    plan = batch.plan
    # NaN: what is read before it was written shows.
    h = walled(torch.full((siblings, tokens, parts, batch.max_rank), float("nan"), device=batch.x.device))
    ys = [walled(y) for y in batch.ys]
    if ids:
        embedding.lookup(batch.x, h.tensor, batch.table, plan, batch.columns[0], batch.weight)
    else:
        module.shrink(batch.x, h.tensor, batch.table, plan, batch.columns, batch.weight, tile)
    module.expand([y.tensor for y in ys], h.tensor, batch.table, plan, batch.columns, batch.weight, tile)
    assert h.intact() and all(y.intact() for y in ys), "written beyond the end"
    return [y.tensor for y in ys]


def same_bits(a, b):
    """Unlike torch.equal, which takes -0.0 for 0.0."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


def relative(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def allowed(batch, exact):
    """The error that y may have: that of rounding the exact result once, and a little for sums in fp32."""
    dtype = batch.ys[0].dtype
    rounding = relative(exact.to(dtype), exact)
    if exact.device.type == "cpu":
        # The interpreter cuts bf16 off instead of rounding: up to twice the error.
        return (2.2 if dtype == BF16 else 1.1) * rounding + 5e-7
    if dtype == FP32 and batch.weight == BF16:
        return 2**-16  # prefill takes shrink's sums as two bf16 numbers
    # Matrix units add up less exactly than fp32's own additions.
    return 1.1 * rounding + 4e-6


def check(batch, ys):
    """Against fp64; and rows that have no adapter, or an empty one, keep their bits."""
    for sibling, (y, exact) in enumerate(zip(ys, batch.exact(), strict=True)):
        assert not y.isnan().any()
        assert relative(y, exact) <= allowed(batch, exact), f"sibling {sibling}"
        for row in range(len(batch.slots)):
            if not batch.served(row)[sibling]:
                assert same_bits(batch.of(y, row), batch.of(batch.ys[sibling], row)), f"sibling {sibling}, row {row}"
