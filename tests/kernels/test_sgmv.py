"""Every kernel against fp64: on the GPU, or in Triton's interpreter."""

import pytest
import torch
from batches import BF16, DTYPES, FP32, SMALL, batch, check, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit_kernels import sgmv
from lorakit_kernels.tuning import tiles

MIXED = [2, -1, 0, 2, 2, 1, -1, 2, 0]

CASES = {
    "one row": {"slots": [0], "ranks": [8], "outs": [64]},
    "one row of the base": {"slots": [-1], "ranks": [8], "outs": [64]},
    "all rows of the base": {"slots": [-1] * 5, "ranks": [8, 8], "outs": [64]},
    "one slot for all": {"slots": [1] * 7, "ranks": [3, 8], "outs": [64, 40]},
    "every row its own slot, not in order": {"slots": [4, 0, 3, 1, 2], "ranks": [8, 16, 3, 1, 17], "outs": [40]},
    "slots that no row has": {"slots": [5, 5, 1], "ranks": [8, 16, 3, None, 0, 17, 33, 1], "outs": [40]},
    "ranks 1 to 128": {
        "slots": [7, -1, 0, 5, 2, 1, -1, 2, 4, 3, 6, 7],
        "ranks": [1, 3, 8, 16, 17, 33, 64, 128],
        "outs": [130],
    },
    "rank 512": {"slots": [0, 1, -1, 0], "ranks": [512, 16], "outs": [40]},
    "a last tile of ranks that is not full": {"slots": [0, -1, 1], "ranks": [8, 70], "outs": [40], "in_features": 300},
    "more ranks allowed than there are": {"slots": [0, -1, 1], "ranks": [8, 17], "outs": [40], "max_rank": 144},
    "odd sizes": {"slots": MIXED, "ranks": [17, 1, 33], "outs": [265, 130, 1], "in_features": 777},
    "one input, one output": {"slots": MIXED, "ranks": [1, 16, 3], "outs": [1], "in_features": 1},
    "two siblings": {"slots": MIXED, "ranks": [(3, 16), (64, 1), (8, 8)], "outs": [64, 130]},
    "four siblings": {
        "slots": MIXED,
        "ranks": [(3, 16, 33, 1), (64, 1, 8, 8), (1, 17, 16, 3)],
        "outs": [64, 130, 16, 1],
        "per_row": 3,
    },
    "siblings that some slots leave out": {
        "slots": MIXED,
        "ranks": [(8, None, 0), (None, None, None), (0, 33, 3)],
        "outs": [64, 70, 130],
    },
    "c and d without factors": {"slots": [0, -1, 1, 0], "ranks": [0, 0], "outs": [70, 64]},
    "neither c nor d": {"slots": MIXED, "ranks": [8, 3, 16], "outs": [70, 64], "channels": False},
    "three tokens a row": {"slots": MIXED, "ranks": [8, 0, 17], "outs": [70], "per_row": 3},
    "seventy tokens a row": {"slots": [1, -1, 0], "ranks": [8, 17], "outs": [20], "in_features": 32, "per_row": 70},
}


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_fp32_allows(device, name, path):
    case = batch(device, **CASES[name])
    check(case, run(case, SMALL[path]))


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_kernels_err_by_one_rounding_in_every_dtype(device, dtypes, path):
    case = batch(
        device,
        slots=MIXED,
        ranks=[(17, 1), (None, 0), (3, 33)],
        outs=[265, 130],
        in_features=777,
        dtypes=DTYPES[dtypes],
    )
    check(case, run(case, SMALL[path]))


@pytest.mark.parametrize("path", SMALL)
@settings(max_examples=8)
@given(data=st.data())
def test_any_mix_of_rows(device, path, data):
    ranks = data.draw(st.lists(st.sampled_from([None, 0, 1, 8, 17]), min_size=1, max_size=5), "ranks")
    slots = data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=12), "slots")
    per_row = data.draw(st.sampled_from([1, 2, 5, 17]), "tokens a row") if len(slots) < 6 else 1
    torch.manual_seed(0)
    case = batch(device, slots=slots, ranks=ranks, outs=[40, 65], per_row=per_row, dtypes=(FP32, FP32), max_rank=32)
    check(case, run(case, SMALL[path]))


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (BF16, FP32)], ids=["fp32", "bf16", "bf16, fp32"])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_lookup(device, ids, dtypes, path):
    case = batch(
        device,
        slots=MIXED,
        ranks=[17, 1, 8],
        outs=[65],
        per_row=5,
        vocabulary=50,
        ids=ids,
        dtypes=dtypes,
    )
    check(case, run(case, SMALL[path]))


def test_lookup_leaves_out_what_has_no_factors(device):
    case = batch(device, slots=MIXED, ranks=[None, 0, 8], outs=[65], vocabulary=50)
    check(case, run(case, SMALL["decode"]))


def public(case):
    """y by the operators, with the tiles of this GPU."""
    shared = (case.table, case.plan)
    ys = [y.clone() for y in case.ys]
    if case.x.ndim == 1:
        h = sgmv.lookup(case.x, *shared, case.columns[0], case.max_rank, case.weight)
    else:
        h = sgmv.shrink(case.x, *shared, case.columns, case.max_rank, case.weight)
    sgmv.expand_(ys, h, *shared, case.columns, case.weight)
    return ys


@pytest.mark.parametrize("per_row", [1, 3, 70])
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16)], ids=["fp32", "bf16"])
def test_operators(device, dtypes, per_row):
    case = batch(
        device,
        slots=[1, -1, 0, 1, 2],
        ranks=[(17, 1, None), (8, 16, 3), (33, 0, 1)],
        outs=[265, 130, 1],
        in_features=777,
        per_row=per_row,
        dtypes=dtypes,
    )
    check(case, public(case))


@pytest.mark.parametrize("segments", [3, 4, 16])
def test_rows_of_single_tokens_need_programs_for_their_segments_alone(device, segments):
    """As many as slots in use suffice, and give the same bits as one a row."""
    slots = [1, 1, 1, -1, 0, 1, 2, 2] * (tiles(device).decode_tokens // 8 + 1)
    case = batch(device, slots=slots, ranks=[(17, 1), (8, 16), (33, 0)], outs=[65, 33])
    table, rows = case.table, case.plan
    assert len(slots) > tiles(case.x.device).decode_tokens, "these are the kernels for many tokens"
    every, bound = [], []
    for ys, most in ((every, 0), (bound, segments)):
        ys += [y.clone() for y in case.ys]
        h = sgmv.shrink(case.x, table, rows, case.columns, case.max_rank, case.weight, most)
        sgmv.expand_(ys, h, table, rows, case.columns, case.weight, most)
    check(case, bound)
    assert all(same_bits(a, b) for a, b in zip(every, bound, strict=True))


@pytest.mark.parametrize("per_row", [1, 70])
def test_operators_of_an_embedding(device, per_row):
    case = batch(device, slots=[1, -1, 0, 1], ranks=[17, 8], outs=[265], vocabulary=50, per_row=per_row)
    check(case, public(case))


@pytest.mark.parametrize("per_row", [1, 70])
def test_operators_leave_the_base_alone(device, per_row):
    case = batch(device, slots=[-1, -1], ranks=[17], outs=[65, 33], per_row=per_row)
    for y, before in zip(public(case), case.ys, strict=True):
        assert same_bits(y, before)
