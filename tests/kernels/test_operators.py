"""The operators as torch.library sees them: schemas, fake tensors, compilation."""

import pytest
import torch
from batches import FP32, batch, relative, same_bits

from lorakit_kernels import sgmv

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def case(device):
    # Every row has an adapter that fills all ranks: what shrink leaves undefined could not be compared.
    return batch(device, slots=[1, 0, 1], ranks=[16, 16], outs=[40, 24])


@pytest.fixture
def ids_case(device):
    return batch(device, slots=[1, 0, 1], ranks=[16, 16], outs=[40], vocabulary=20)


def shrink(case):
    return sgmv.shrink(case.x, case.table, case.plan, case.columns, case.max_rank, case.weight)


@pytest.mark.parametrize("test", TESTS)
def test_shrink_is_a_proper_operator(case, test):
    arguments = (case.x, case.table, case.plan, case.columns, case.max_rank, FP32)
    torch.library.opcheck(torch.ops.lorakit_kernels.shrink.default, arguments, test_utils=test)


@pytest.mark.parametrize("test", TESTS)
def test_lookup_is_a_proper_operator(ids_case, test):
    case = ids_case
    arguments = (case.x, case.table, case.plan, case.columns[0], case.max_rank, FP32)
    torch.library.opcheck(torch.ops.lorakit_kernels.lookup.default, arguments, test_utils=test)


@pytest.mark.parametrize("test", TESTS)
def test_expand_is_a_proper_operator(case, test):
    arguments = (case.ys, shrink(case), case.table, case.plan, case.columns, FP32)
    torch.library.opcheck(torch.ops.lorakit_kernels.expand_.default, arguments, test_utils=test)


@pytest.mark.parametrize("test", TESTS)
def test_replace_is_a_proper_operator(case, test):
    arguments = (case.ys[0], case.x, case.table, case.plan, case.columns[0], FP32)
    torch.library.opcheck(torch.ops.lorakit_kernels.replace_.default, arguments, test_utils=test)


@pytest.mark.parametrize("per_row", [1, 40], ids=["decode", "prefill"])
def test_fake_tensors_have_the_shapes_of_real_ones(device, per_row):
    case = batch(device, slots=[1, 0], ranks=[(17, 8), (1, 16)], outs=[40, 24], in_features=777, per_row=per_row)
    real = shrink(case)
    with torch._subclasses.FakeTensorMode() as mode:
        x, table, plan = (mode.from_tensor(tensor) for tensor in (case.x, case.table, case.plan))
        fake = torch.ops.lorakit_kernels.shrink(x, table, plan, case.columns, case.max_rank, case.weight)
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (real.shape, real.stride(), real.dtype, real.device)


def adapted(x, ids, weight, ys, embedded, rows, rows_of_ids):
    """A base's products and lookups, with the adapters' shares on top: all three operators, once compiled."""
    (table, plan, columns, max_rank), (id_table, id_plan, id_column, id_rank) = rows, rows_of_ids
    base = [y + x @ weight[:, : y.shape[-1]] for y in ys]
    h = sgmv.shrink(x, table, plan, columns, max_rank, torch.float32)
    sgmv.expand_(base, h, table, plan, columns, torch.float32)
    looked_up = embedded * 2
    h = sgmv.lookup(ids, id_table, id_plan, id_column, id_rank, torch.float32)
    sgmv.expand_([looked_up], h, id_table, id_plan, [id_column], torch.float32)
    return [*(y.relu() for y in base), looked_up]


def test_a_compiled_model_calls_them_without_a_break(device, case, ids_case):
    arguments = (
        case.x,
        ids_case.x,
        torch.randn(case.x.shape[1], 64, device=device),
        case.ys,
        ids_case.ys[0],
        (case.table, case.plan, case.columns, case.max_rank),
        (ids_case.table, ids_case.plan, ids_case.columns[0], ids_case.max_rank),
    )
    expected = adapted(*arguments)
    torch._dynamo.reset()
    actual = torch.compile(adapted, fullgraph=True, backend="aot_eager")(*arguments)
    for y, wanted in zip(actual, expected, strict=True):
        assert relative(y, wanted.double()) <= 1e-6


def test_operators_launch_what_is_launched_without_them(case):
    operators = torch.ops.lorakit_kernels
    h = shrink(case)
    assert torch.equal(operators.shrink(case.x, case.table, case.plan, case.columns, case.max_rank, case.weight), h)
    launched, operated = ([y.clone() for y in case.ys] for _ in range(2))
    sgmv.expand_(launched, h, case.table, case.plan, case.columns, case.weight)
    operators.expand_(operated, h, case.table, case.plan, case.columns, case.weight)
    assert all(same_bits(a, b) for a, b in zip(launched, operated, strict=True))


def test_inputs_are_left_as_they_are(case):
    before = [tensor.clone() for tensor in (case.x, case.table)]
    h = shrink(case)
    sums = h.clone()
    ys = [y.clone() for y in case.ys]
    sgmv.expand_(ys, h, case.table, case.plan, case.columns, case.weight)
    assert torch.equal(h, sums)
    assert torch.equal(case.x, before[0]) and torch.equal(case.table, before[1])
