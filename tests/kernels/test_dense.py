"""The base's own products of siblings, in one launch: what they give, where they may be used, and as an operator."""

import dataclasses

import pytest
import torch
from batches import BF16, FP16, relative, walled

from lorakit_kernels import dense, linear, tuning
from lorakit_kernels.tuning import Dense

SMALL = Dense(tokens=64, block_n=32, block_k=32, warps=4, stages=2)
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def case(device, tokens, outs, in_features=96, dtype=BF16, bias=False):
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return (
        random(tokens, in_features),
        [random(out, in_features) for out in outs],
        [random(out) for out in outs if bias],
    )


def products(x, weights, biases, tile=SMALL):
    ys = [walled(x.new_full((len(x), len(weight)), float("nan"))) for weight in weights]
    dense.products(x, weights, biases, [y.tensor for y in ys], tile)
    assert all(y.intact() for y in ys)
    return [y.tensor for y in ys]


def exact(x, weights, biases):
    ys = [x.double() @ weight.double().mT for weight in weights]
    return [y + bias.double() for y, bias in zip(ys, biases, strict=True)] if biases else ys


@pytest.fixture
def with_tiles(monkeypatch):
    """Tiles for every device, also for the interpreter's."""
    monkeypatch.setattr(linear, "tiles", lambda device: dataclasses.replace(tuning.tiles(device), dense=SMALL))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize("outs", [(64, 40), (32, 7, 1, 33)], ids=str)
def test_all_siblings_get_their_product(device, outs, tokens, dtype, bias):
    operands = case(device, tokens, outs, dtype=dtype, bias=bias)
    for y, expected in zip(products(*operands), exact(*operands), strict=True):
        # One rounding of a sum in fp32.
        assert relative(y, expected) < (2e-3 if dtype == FP16 else 8e-3)


def test_what_shares_the_batch_changes_no_bit(device):
    x, weights, biases = case(device, 40, (64, 40))
    together = products(x, weights, biases)
    for first, last in ((0, 1), (3, 8), (8, 40)):
        some = products(x[first:last].contiguous(), weights, biases)
        assert all(torch.equal(y, all_[first:last]) for y, all_ in zip(some, together, strict=True))


@pytest.mark.parametrize("test", TESTS)
def test_it_is_a_proper_operator(device, with_tiles, test):
    operands = case(device, 5, (64, 32), bias=True)
    torch.library.opcheck(torch.ops.lorakit_kernels.linears.default, operands, test_utils=test)


def test_the_operator_gives_what_the_kernel_gives(device, with_tiles):
    operands = case(device, 5, (64, 32), bias=True)
    compiled = torch.compile(linear.linears, fullgraph=True, backend="eager")
    for found in (linear.linears(*operands), compiled(*operands)):
        assert all(torch.equal(y, own) for y, own in zip(found, products(*operands), strict=True))


def test_what_it_does_not_take(device, with_tiles):
    x, weights, _ = case(device, 5, (64, 32))
    on_gpu = device.type == "cuda"
    assert linear.can_join(x, weights) == on_gpu
    assert linear.can_join(x[None], weights) == on_gpu
    assert not linear.can_join(x, weights[:1])
    assert not linear.can_join(x, weights * 3)
    assert not linear.can_join(x.float(), [weight.float() for weight in weights])
    assert not linear.can_join(x, [weight.float() for weight in weights])
    assert not linear.can_join(x, [weight.mT.contiguous().mT for weight in weights])
    assert not linear.can_join(x.repeat(13, 1), weights)
    assert not linear.can_join(x[:, :80].contiguous(), [weight[:, :80].contiguous() for weight in weights])


def test_a_gpu_that_nobody_measured_keeps_its_own(device):
    fallback = tuning.read(tuning._FOLDER / "fallback.json")
    assert fallback.dense is None
    if device.type == "cpu":
        assert not linear.can_join(*case(device, 5, (64, 32))[:2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 32, 64])
@pytest.mark.parametrize("outs", [(4096, 1024, 1024), (11008, 11008)], ids=str)
def test_with_the_tiles_of_this_gpu(outs, tokens):
    device = torch.device("cuda")
    operands = case(device, tokens, outs, in_features=4096)
    if not linear.can_join(*operands[:2]):
        pytest.skip("this GPU has no tiles for it")
    for y, expected in zip(linear.linears(*operands), exact(*operands), strict=True):
        assert relative(y, expected) < 8e-3
