"""Whole weights of adapters against fp64: on the GPU, or in Triton's interpreter."""

import pytest
import torch
from batches import BF16, DTYPES, FP32, relative, same_bits, walled

from lorakit_kernels import replace_
from lorakit_kernels.entries import WORDS, entry
from lorakit_kernels.plan import plan
from lorakit_kernels.reference import Weights, sgmv

CASES = {
    "one row": {"slots": [0]},
    "base rows only": {"slots": [-1, -1]},
    "every kind of row": {"slots": [2, -1, 0, 2, 2, 1, -1, 3, 0]},
    "odd sizes": {"slots": [2, -1, 0, 1], "in_features": 77, "out": 131},
    "one input": {"slots": [0, -1], "in_features": 1, "out": 33},
    "three tokens a row": {"slots": [1, -1, 0, 1], "per_row": 3},
    "seventy tokens a row": {"slots": [1, -1, 0], "per_row": 70, "out": 20},
}


def made(device, slots, *, in_features=64, out=96, per_row=1, dtypes=(FP32, FP32), vocabulary=None):
    """x, y, table, what lies behind its addresses, and walls: slots 0 and 1 bring a weight, 2 factors, 3 nothing."""
    dtype, weight = dtypes
    tokens = len(slots) * per_row
    kept, table = [], torch.zeros((5, 3, WORDS), dtype=torch.int64)

    def keep(tensor):
        kept.append(walled(tensor.to(device)))
        return kept[-1].tensor

    weights = {}
    for slot in (0, 1):
        rows, columns = (out, in_features) if vocabulary is None else (vocabulary, out)
        w = keep((torch.randn(rows, columns) * in_features**-0.5).to(weight))
        # An embedding has no bias.
        d = keep(torch.randn(out)) if slot and vocabulary is None else None
        weights[slot] = Weights(w=w, d=d, scale=1.0 if slot else 1.5)
        of_slot = weights[slot]
        table[slot, 1] = torch.tensor(entry(None, None, of_slot.scale, None, of_slot.d, of_slot.w))
    a = keep(torch.full((16, max(in_features, out)), float("nan")).to(weight))
    table[2, 1] = torch.tensor(entry(a, a, 1.0, None, None))
    x = keep(torch.randn(tokens, in_features).to(dtype))
    if vocabulary is not None:
        x = torch.randint(vocabulary, (tokens,)).to(device)
    y = torch.randn(tokens, out).to(device, dtype)
    y[:, 0] = float("nan")  # not used where an adapter has a weight, and kept elsewhere
    return x, y, table.to(device), weights, kept


@pytest.mark.parametrize("vocabulary", [None, 50], ids=["linear", "embedding"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16 x, fp32 weights", "fp32 x, bf16 weights"])
@pytest.mark.parametrize("name", CASES)
def test_rows_get_their_adapters_weight_and_others_keep_their_bits(device, name, dtypes, vocabulary):
    case = CASES[name]
    slots = case["slots"]
    x, y, table, weights, _kept = made(device, **case, dtypes=DTYPES[dtypes], vocabulary=vocabulary)
    result = walled(y)
    replace_(result.tensor, x, table, plan(torch.tensor(slots, device=device)), 1, DTYPES[dtypes][1])
    assert result.intact()
    exact = sgmv(y, x, slots, weights, embedding=vocabulary is not None)
    token_slots = torch.tensor(slots).repeat_interleave(case.get("per_row", 1))
    served = (token_slots == 0) | (token_slots == 1)
    assert same_bits(result.tensor[~served], y[~served])
    if served.any():
        error, rounding = (relative(value[served], exact[served]) for value in (result.tensor, exact.to(y.dtype)))
        # The interpreter cuts bf16 off instead of rounding.
        cut = 2**-7 if y.dtype == BF16 and device.type == "cpu" else 0
        assert error <= max(1.1 * rounding + (5e-7 if device.type == "cpu" else 4e-6), cut)


def test_a_rows_bits_do_not_depend_on_the_batch(device):
    x, y, table, _, _kept = made(device, [0, 1, 0, -1], dtypes=(BF16, BF16))
    together = y.clone()
    replace_(together, x, table, plan(torch.tensor([0, 1, 0, -1], device=device)), 1, BF16)
    for row, slot in enumerate([0, 1, 0, -1]):
        alone = y[row : row + 1].clone()
        replace_(alone, x[row : row + 1], table, plan(torch.tensor([slot], device=device)), 1, BF16)
        assert same_bits(alone[0], together[row])
