"""The same job done by others: y ← y + s · B A x in place, for every row by its own adapter.

Each is a function of the group, x, the siblings' y and the batch. All adapters of a group have one rank here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shapes import SCALE, Batch, Group
from torch import Tensor
from triton import TritonError

Rival = Callable[[Group, Tensor, Sequence[Tensor], Batch], None]
FAILURES = (ImportError, AttributeError, TypeError, AssertionError, RuntimeError, TritonError)
"""What a rival may fail with that is not there, does not know the GPU, or cannot be captured."""


def gather_bmm(group: Group, x: Tensor, ys: Sequence[Tensor], batch: Batch) -> None:
    """Copies A and B of every row side by side, then two batched products and a sum."""
    rows = x.view(len(batch.slots), batch.tokens_per_row, -1)
    for i, y in enumerate(ys):
        h = torch.bmm(rows, group.batched_a(i)[batch.slots_tensor].transpose(1, 2))
        share = torch.bmm(h, group.batched_b(i)[batch.slots_tensor])
        y.add_(share.view(y.shape), alpha=SCALE)


def grouped_mm(group: Group, x: Tensor, ys: Sequence[Tensor], batch: Batch) -> None:
    """PyTorch's grouped product, made for mixtures of experts: tokens sorted by adapter, two products and a sum."""
    functional: Any = torch.nn.functional
    product = functional.grouped_mm if hasattr(functional, "grouped_mm") else torch._grouped_mm
    order = batch.order
    tokens = x if order is None else x[order]
    used = len(batch.ends)
    for i, y in enumerate(ys):
        h = product(tokens, group.batched_a(i)[:used].transpose(1, 2), offs=batch.ends)
        share = product(h, group.batched_b(i)[:used], offs=batch.ends)
        if order is None:
            y.add_(share, alpha=SCALE)
        else:
            y.index_add_(0, order, share, alpha=SCALE)


def peft_loop(group: Group, x: Tensor, ys: Sequence[Tensor], batch: Batch) -> None:
    """What PEFT does with a mixed batch: adapter by adapter, its rows are picked, multiplied twice and added."""
    for i, y in enumerate(ys):
        for slot, tokens in batch.segments:
            share = x[tokens] @ group.a(i, slot).T @ group.b(i, slot)
            y.index_add_(0, tokens, share, alpha=SCALE)


def vllm_triton(group: Group, x: Tensor, ys: Sequence[Tensor], batch: Batch) -> None:
    """vLLM's Triton kernels: one launch for the siblings' A, and one for each sibling's B, as y is not one tensor."""
    from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

    h = x.new_empty((len(ys), len(x), group.ranks[0]), dtype=torch.float32)
    meta = _vllm_meta(batch, len(group.ranks))
    lora_shrink(x, [group.batched_a(i) for i in group.columns], h, *meta, SCALE)
    for i, y in enumerate(ys):
        lora_expand(h[i : i + 1], [group.out_first_b[i]], y, *meta, offset_start=0, add_inputs=True)


@functools.lru_cache(maxsize=64)
def _vllm_meta(batch: Batch, adapters: int) -> tuple[Any, ...]:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    meta = LoRAKernelMeta.make(adapters, batch.tokens, device="cuda")
    meta.prepare_tensors(batch.slots_tensor.to(torch.int32).repeat_interleave(batch.tokens_per_row))
    # Newer versions ask whether to launch for the adapters in use alone.
    options = [True] if len(inspect.signature(meta.meta_args).parameters) > 1 else []
    return tuple(meta.meta_args(batch.tokens, *options))


RIVALS: dict[str, Rival] = {
    "gather + bmm": gather_bmm,
    "grouped_mm": grouped_mm,
    "PEFT's loop": peft_loop,
    "vLLM's Triton": vllm_triton,
}


def attempt(name: str, measure: Callable[[], list[float]]) -> list[float] | None:
    """Measures a rival; where it fails, says why and gives None."""
    try:
        return measure()
    except FAILURES as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        print(f"skipped {name}: {type(error).__name__}: {reason[:160]}", flush=True)
        torch.cuda.synchronize()
        return None
