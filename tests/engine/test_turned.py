"""Linear modules the other way round: equal results, where that is faster, and nothing left behind."""

import pytest
import torch
from torch import nn

from lorakit.engine.turned import FEWEST, MOST, turned


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 24, bias=False))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL")
@pytest.mark.parametrize(("rows", "times"), [(1, 0), (FEWEST - 1, 0), (FEWEST, 2), (MOST, 2), (MOST + 1, 0)])
def test_for_few_rows_it_is_the_other_way_round(model, rows, times, monkeypatch):
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given: calls.append(given) or real(*given))
    x = torch.randn(2, rows, 48)[:1].transpose(0, 1)
    expected = model.double()(x.double())
    model.float()
    with torch.no_grad(), turned(model):
        found = model(x)
    assert len(calls) == times
    assert found.is_contiguous() and found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def test_what_is_not_plain_is_left_alone(model):
    half = nn.Linear(4, 4, dtype=torch.bfloat16)
    other = type("Other", (nn.Linear,), {})(4, 4)
    wrapped = nn.Linear(4, 4)
    wrapped.forward = own = lambda x: x
    with turned(nn.ModuleList([half, other, wrapped])):
        assert "forward" not in vars(half) and "forward" not in vars(other) and wrapped.forward is own
    assert wrapped.forward is own


def test_it_leaves_nothing_behind(model):
    with pytest.raises(KeyError), turned(model):
        assert not torch.backends.mkl.is_available() or "forward" in vars(model[0])
        raise KeyError
    assert "forward" not in vars(model[0])
