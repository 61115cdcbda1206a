"""The plan against one made row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit_kernels.plan import COLUMNS, plan


def obvious(slots):
    """The plan as its docstring tells it."""
    lines = [[max(slot, -1), -1, -1, 0, 0, 0, 0, 0] for slot in slots]
    served = sorted(slot for slot in slots if slot >= 0)
    ordered = [row for wanted in sorted({*served}) for row, slot in enumerate(slots) if slot == wanted]
    for place, row in enumerate(ordered):
        lines[place][1] = row
    for segment, slot in enumerate(sorted({*served})):
        start = served.index(slot)
        lines[segment][2:5] = [slot, start, start + served.count(slot)]
    return lines


@given(st.lists(st.integers(-2, 6), max_size=40), st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_any_rows(slots, dtype):
    made = plan(torch.tensor(slots, dtype=dtype))
    assert made.dtype == torch.int32 and made.shape == (len(slots), COLUMNS)
    assert made.is_contiguous()
    assert made.tolist() == obvious(slots)


@pytest.mark.parametrize("slots", [[-1] * 5, [3] * 5, list(range(5)), [2, -1, 2, -1, 2]], ids=str)
def test_extremes(device, slots):
    made = plan(torch.tensor(slots, device=device))
    assert made.device.type == device.type
    assert made.tolist() == obvious(slots)


def test_slots_may_be_large():
    slots = [100_000, -1, 2**31 - 2, 100_000]
    assert plan(torch.tensor(slots)).tolist() == obvious(slots)


@pytest.mark.gpu
def test_a_plan_is_made_without_waiting(device):
    slots = torch.tensor([2, -1, 0, 2], device=device)
    plan(slots)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = plan(slots)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert made.tolist() == obvious([2, -1, 0, 2])


@pytest.mark.gpu
def test_a_plan_is_made_within_a_cuda_graph(device):
    slots = torch.tensor([2, -1, 0, 2], device=device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        plan(slots)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = plan(slots)
    for wanted in ([2, -1, 0, 2], [0, 0, 0, -1], [-1, -1, -1, -1]):
        slots.copy_(torch.tensor(wanted))
        graph.replay()
        assert made.tolist() == obvious(wanted)
