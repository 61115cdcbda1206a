"""The plan: which rows of a batch share a slot, in one small int32 tensor that every launch of a forward reads.

A row is one of the batch's n entries and brings the same number of tokens as every other. The plan depends on the
rows' slots alone, not on modules, ranks or tokens, so it is made once for a forward, or for a whole generation. It is
int32 of shape (n, 8), and has room for the worst mix, so a CUDA graph can keep it:

    column 0      row i's slot, -1 for the base: what decode works on
    column 1      the i-th row when rows are sorted by slot, -1 past the last; rows of the base are left out
    column 2      segment i's slot, -1 when there are fewer segments: all rows of one slot, what prefill works on
    columns 3, 4  where segment i begins and ends in column 1
    columns 5-7   nothing; a line of 32 bytes is read at once
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 8


def plan(slots: Tensor) -> Tensor:
    """Makes a plan, on the device of `slots`, without waiting for it.

    Args:
        slots: (n,) of any integer dtype, the slot of each row, -1 for the base.

    Returns:
        (n, 8) int32.
    """
    n = slots.shape[0]
    nowhere = torch.iinfo(torch.int32).max
    key, order = torch.sort(torch.where(slots < 0, nowhere, slots.long()), stable=True)
    served = key < nowhere
    start, end = torch.searchsorted(key, key), torch.searchsorted(key, key, right=True)
    leads = served & (start == torch.arange(n, device=slots.device))

    # Rows that lead no segment are written to a line past the end.
    out = torch.zeros((n + 1, COLUMNS), dtype=torch.int64, device=slots.device)
    out[:, 2] = -1
    out[torch.where(leads, torch.cumsum(leads, 0) - 1, n), 2:5] = torch.stack([key, start, end], dim=1)
    out[:n, 0] = slots.clamp(min=-1)
    out[:n, 1] = torch.where(served, order, -1)
    return out[:n].to(torch.int32)
