"""A row's bits depend on its own tokens and adapter alone: not on other rows, their number, order or content."""

import pytest
from batches import BF16, FP32, SMALL, batch, run, same_bits

from lorakit_kernels.tuning import tiles

SLOTS = [1, 0, 1, -1, 2, 1, 0, 1]

# Rows of the batch, None for a row of the base between them: alone, in pairs of one slot, in other orders and numbers.
MIXES = {
    "alone": [2],
    "alone, another": [4],
    "with one of the same slot": [2, 5],
    "with another of the same slot": [7, 2],
    "backwards": [7, 6, 5, 4, 3, 2, 1, 0],
    "shuffled": [3, 5, 0, 7, 1, 6, 2, 4],
    "base rows between": [None, 2, None, None, 0, 5, 6, None],
    "some left out": [0, 4, 5],
    "the same row three times": [2, 2, 2],
}


@pytest.fixture(params=["small tiles", "the GPU's tiles"])
def tile_of(request, device):
    def tile(path):
        return SMALL[path] if request.param == "small tiles" else getattr(tiles(device), path)

    return tile


def mixed(device, dtypes=(FP32, FP32), per_row=3, in_features=300):
    return batch(
        device,
        slots=SLOTS,
        ranks=[(17, 8), (1, 16), (8, None)],
        outs=[130, 33],
        in_features=in_features,
        per_row=per_row,
        dtypes=dtypes,
    )


def unchanged(batch, row, ys, others, place):
    """Whether a row of `ys`, of the batch, has the bits of another result's row at `place`."""
    length = batch.per_row
    return all(
        same_bits(batch.of(y, row), other[place * length : (place + 1) * length])
        for y, other in zip(ys, others, strict=True)
    )


@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16)], ids=["fp32", "bf16"])
def test_other_rows_change_no_bit(device, tile_of, dtypes, path):
    whole = mixed(device, dtypes, per_row=1 if path == "decode" else 2)
    ys = run(whole, tile_of(path))
    for name, rows in MIXES.items():
        others = run(whole.rows(rows), tile_of(path))
        for place, row in enumerate(rows):
            assert row is None or unchanged(whole, row, ys, others, place), f"{name}: row {row}"


@pytest.mark.parametrize("path", SMALL)
def test_the_same_call_gives_the_same_bits(device, path):
    whole = mixed(device, (BF16, BF16))
    first, second = run(whole, SMALL[path]), run(whole, SMALL[path])
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("path", SMALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_an_adapter_full_of_nan_spoils_its_own_rows_only(device, value, path):
    whole = mixed(device, (BF16, BF16), per_row=1)
    before = run(whole, SMALL[path])
    for weights in whole.weights:
        if 1 in weights:
            for tensor in (weights[1].a, weights[1].b, weights[1].c, weights[1].d):
                if tensor is not None:
                    tensor.fill_(value)
    after = run(whole, SMALL[path])
    for row, slot in enumerate(SLOTS):
        if slot == 1:
            assert not any(whole.of(y, row).isfinite().any() for y in after)
        else:
            assert unchanged(whole, row, before, after, row)


@pytest.mark.parametrize("path", SMALL)
def test_a_row_full_of_nan_spoils_no_other_of_its_slot(device, path):
    whole = mixed(device, (BF16, BF16), per_row=2)
    before = run(whole, SMALL[path])
    bad = 5
    whole.of(whole.x, bad).fill_(float("nan"))
    after = run(whole, SMALL[path])
    for row in range(len(SLOTS)):
        assert (
            all(whole.of(y, row).isnan().all() for y in after)
            if row == bad
            else unchanged(whole, row, before, after, row)
        )


@pytest.mark.parametrize("path", SMALL)
def test_an_embeddings_rows_are_independent_too(device, path):
    whole = batch(device, slots=SLOTS, ranks=[17, 8, 1], outs=[130], vocabulary=50)
    ys = run(whole, SMALL[path])
    for name, rows in MIXES.items():
        others = run(whole.rows(rows), SMALL[path])
        for place, row in enumerate(rows):
            assert row is None or unchanged(whole, row, ys, others, place), f"{name}: row {row}"
