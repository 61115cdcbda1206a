"""Sampling: the tokens that may be drawn are transformers' own, each as often as its probability says, row by row."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lorakit.engine.sampling import GREEDY, ROWS, Settings, draw, greedy, logprobs_of, rows_of, sample

INF = float("inf")


def warped(logits, temperature, top_k=0, top_p=1.0):
    """The probabilities of transformers' warpers, in fp64."""
    scores = TemperatureLogitsWarper(float(temperature))(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)


def over_draws(logits, count, temperature=1.0, top_k=0, top_p=1.0):
    """How often each token comes with draws that lie evenly in [0, 1)."""
    settings = [Settings(temperature, top_k, top_p, (i + 0.5) / count) for i in range(count)]
    tokens = sample(logits.expand(count, -1), rows_of(settings))
    return tokens.bincount(minlength=logits.shape[-1])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.8), (12, 0.7), (1000, 0.999), (1, 1.0)])
def test_each_token_has_the_share_of_all_draws_that_transformers_gives_it(temperature, top_k, top_p):
    logits = 3 * torch.randn(1, 40)
    count = 1 << 13
    expected = warped(logits, temperature, top_k, top_p)[0] * count
    found = over_draws(logits, count, temperature, top_k, top_p)
    assert (found - expected).abs().max() <= 1 + 1e-3
    assert not found[expected == 0].any()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 10, 0.9)])
def test_draws_of_seeds_follow_the_distribution(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 30)
    settings = [Settings(temperature, top_k, top_p, draw(f"{i}/0", place)) for i in range(1000) for place in range(20)]
    found = sample(logits.expand(len(settings), -1), rows_of(settings)).bincount(minlength=30)
    expected = warped(logits, temperature, top_k, top_p)[0] * len(settings)
    likely = expected >= 5
    assert not found[expected == 0].any()
    # The unlikely ones are counted together.
    found, expected = ([*x[likely].tolist(), x[~likely].sum().item() + 1] for x in (found, expected))
    assert chisquare(found, expected).pvalue > 1e-3


def test_draws_are_uniform_and_differ_by_seed_and_place():
    draws = [draw(f"{seed}/0", place) for seed in range(200) for place in range(50)]
    assert len(set(draws)) == len(draws) and min(draws) >= 0 and max(draws) < 1
    assert kstest(draws, "uniform").pvalue > 1e-3
    # Neighbours are unrelated, along a sequence and from seed to seed.
    table = torch.tensor(draws, dtype=torch.float64).view(200, 50)
    for left, right in ((table[:, 1:], table[:, :-1]), (table[1:], table[:-1])):
        assert abs(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]) < 0.04


def test_a_draw_is_the_same_in_every_process():
    assert [draw("7/0", 3), draw("7/1", 3)] == [0.7944671955653098, 0.09722422769684025]


LOGITS = st.lists(st.integers(-40, 40).map(lambda eighths: eighths / 8), min_size=1, max_size=12)


@given(LOGITS, st.sampled_from([0.25, 0.7, 1.0, 3.0]), st.integers(0, 15), st.floats(2**-7, 1, width=32))
def test_the_tokens_that_stay_are_those_of_transformers(values, temperature, top_k, top_p):
    logits = torch.tensor([values])
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    # Where a sum is just top_p, rounding decides.
    sums = scores.softmax(-1).sort(descending=True).values.cumsum(-1)
    assume(not (sums[:, :-1] - top_p).abs().lt(1e-6).any())
    stay = TopPLogitsWarper(top_p)(None, scores)[0] > -INF if top_p < 1 else scores[0] > -INF
    # Of equals at the edge of top-p as many stay, here those with the smaller ids.
    ranks = sorted(range(len(values)), key=lambda token: (-values[token], token))
    expected = set(ranks[: int(stay.sum())])
    assert sorted(values[token] for token in expected) == sorted(logits[0][stay].tolist())
    least = sample(logits, rows_of([Settings(temperature, top_k, top_p, 0.0)])).item()
    is_cut = 0 < top_k < len(values) or top_p < 1
    assert least == (ranks[len(expected) - 1] if is_cut else min(expected))
    found = over_draws(logits, 512, temperature, top_k, top_p).nonzero().flatten().tolist()
    assert set(found) <= expected


def test_top_k_keeps_all_tokens_as_likely_as_the_last():
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]])
    for top_k, stay in ((1, [1]), (2, [1, 3]), (3, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (6, list(range(6)))):
        assert over_draws(logits, 1000, top_k=top_k).nonzero().flatten().tolist() == stay
        assert (TopKLogitsWarper(top_k)(None, logits) > -INF).nonzero()[:, 1].tolist() == stay


def test_the_token_that_crosses_top_p_stays():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    for top_p, stay in ((1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.89, 3), (0.91, 4), (1.0, 4)):
        assert over_draws(logits, 1000, top_p=top_p).nonzero().flatten().tolist() == list(range(stay))


def test_top_p_needs_no_more_equals_than_reach_it():
    assert over_draws(torch.zeros(1, 10), 1000, top_p=0.35).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_top_k_above_the_vocabulary_keeps_all():
    logits = torch.randn(1, 9)
    assert over_draws(logits, 999, top_k=10).equal(over_draws(logits, 999))
    assert over_draws(logits, 999, top_k=2**31 - 1).equal(over_draws(logits, 999))


def test_greedy_rows_beside_sampled_ones_take_the_first_of_the_most_likely():
    logits = torch.randint(-3, 4, (64, 50)).float()  # full of ties
    settings = [GREEDY if i % 2 else Settings(1.0, 5, 0.9, draw("s", i)) for i in range(64)]
    tokens = sample(logits, rows_of(settings))
    assert tokens[1::2].equal(greedy(logits)[1::2])
    assert tokens.dtype == torch.int64 and not tokens.equal(greedy(logits))


@given(st.data())
def test_a_row_is_drawn_the_same_whatever_is_beside_it(data):
    rows = data.draw(st.integers(1, 9))
    logits = 4 * torch.randn(rows, 200, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    a_setting = st.builds(
        Settings,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        top_k=st.integers(0, 250),
        top_p=st.floats(0.05, 1),
        draw=st.floats(0, 1, exclude_max=True),
    )
    settings = data.draw(st.lists(a_setting, min_size=rows, max_size=rows))
    together = sample(logits, rows_of(settings))
    order = data.draw(st.permutations(range(rows)))
    assert sample(logits[order], rows_of([settings[i] for i in order])).equal(together[order])
    for i in range(rows):
        assert sample(logits[i : i + 1], rows_of(settings[i : i + 1])).equal(together[i : i + 1])


def test_the_smallest_and_the_largest_draw_take_tokens_that_may_be_drawn():
    logits = torch.tensor([[3.0, -INF, 2.0, -200.0, 1.0]])
    least, most = 0.0, 1 - 2**-53  # in float32 the latter is 1
    # Of a part of the vocabulary the least likely comes first, of all of it the first.
    for top_k, top_p, expected in ((0, 1.0, [0, 4]), (2, 1.0, [2, 0]), (0, 0.8, [2, 0]), (1, 1.0, [0, 0])):
        tokens = sample(
            logits.expand(2, -1), rows_of([Settings(1.0, top_k, top_p, least), Settings(1.0, top_k, top_p, most)])
        )
        assert tokens.tolist() == expected


def test_tokens_far_less_likely_than_the_precision_of_fp32_sums_have_their_place():
    share = 5e-9
    logits = torch.tensor([[math.log(1 - 2 * share), math.log(share), math.log(share)]])
    for position, token in (
        (0.5 * share, 2),
        (0.99 * share, 2),
        (1.01 * share, 1),
        (1.99 * share, 1),
        (2.1 * share, 0),
    ):
        assert sample(logits, rows_of([Settings(1.0, 0, 1.0, 1 - position)])).item() == token
        assert sample(logits.flip(-1), rows_of([Settings(1.0, 0, 1.0, position)])).item() == 2 - token


def test_without_top_p_no_token_of_a_large_vocabulary_is_lost():
    logits = torch.zeros(1, 200_000)
    settings = [Settings(1.0, 0, 1.0, (i + 0.5) / 200_000) for i in (0, 1, 100_000, 199_998, 199_999)]
    tokens = sample(logits.expand(5, -1), rows_of(settings))
    assert (tokens - torch.tensor([0, 1, 100_000, 199_998, 199_999])).abs().max() <= 1


def test_rows_without_cuts_are_drawn_the_same_beside_rows_with_them():
    logits = 3 * torch.randn(40, 3000)
    settings = [Settings(0.7, 0, 1.0, draw("s", i)) for i in range(39)]
    alone = sample(logits[:39], rows_of(settings), cuts=False)
    assert sample(logits, rows_of([*settings, Settings(1.0, 5, 0.5, 0.3)]))[:39].equal(alone)
    assert len(alone.unique()) > 5


def test_every_device_can_tell_temperatures_from_0_and_from_infinity():
    limits = torch.finfo(torch.float32)
    temperatures = rows_of([Settings(one, 0, 1.0, 0.0) for one in (0.0, 1e-50, 1e-40, 1.0, 1e308)])[0]
    assert temperatures.view(torch.float32).tolist() == [0.0, 0.0, limits.tiny, 1.0, limits.max]


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-40, 1e-6, 1.0, 1e6, 1e38, 1e308])
def test_one_token_alone_is_drawn_at_any_temperature(temperature):
    logits = torch.full((1, 100), -INF)
    logits[0, 42] = -7.0
    settings = [Settings(temperature, 0, 1.0, i / 10) for i in range(10)]
    assert sample(logits.expand(10, -1), rows_of(settings)).tolist() == [42] * 10


def test_small_temperatures_end_in_the_most_likely_token_and_large_ones_in_an_even_choice():
    logits = torch.tensor([[1e4, -1e4, 1e4 + 1, 0.0]])
    for temperature in (1e-45, 1e-40, 1e-20, 1e-3):
        assert over_draws(logits, 100, temperature).tolist() == [0, 0, 100, 0]
    for temperature in (1e12, 1e38, 1e308):
        assert over_draws(logits, 100, temperature).tolist() == [25, 25, 25, 25]


def test_equal_logits_are_drawn_evenly_at_the_smallest_temperature():
    assert over_draws(torch.tensor([[5.0, 5.0, 4.0]]), 100, 1e-40).tolist() == [50, 50, 0]


@pytest.mark.parametrize(
    "broken",
    [[math.nan] * 4, [1.0, math.nan, 0.0, 2.0], [-INF] * 4, [INF, 0.0, INF, -INF]],
    ids=["nan", "one nan", "all -inf", "inf"],
)
@pytest.mark.parametrize("setting", [GREEDY, Settings(1.0, 0, 1.0, 0.5), Settings(0.5, 2, 0.9, 0.0)])
def test_a_broken_row_gets_some_token_and_disturbs_no_other(broken, setting):
    logits = torch.tensor([[0.0, 1.0, 9.0, 2.0], broken, [0.0, 9.0, 1.0, 2.0]])
    usual = Settings(1.0, 0, 0.5, 0.5)
    tokens = sample(logits, rows_of([usual, setting, usual])).tolist()
    assert tokens[0] == 2 and tokens[2] == 1
    assert 0 <= tokens[1] < 4


def test_a_greedy_row_with_nan_is_argmax_too():
    logits = torch.tensor([[1.0, math.nan, 5.0]])
    assert sample(logits, rows_of([GREEDY])).equal(greedy(logits))


def test_a_vocabulary_of_one():
    assert sample(torch.zeros(2, 1), rows_of([GREEDY, Settings(1.0, 3, 0.5, 0.9)])).tolist() == [0, 0]


def test_rows_hold_the_settings():
    rows = rows_of([Settings(0.5, 7, 0.25, 0.75), GREEDY])
    assert rows.shape == (ROWS, 2) and rows.dtype == torch.int32
    assert rows[0].view(torch.float32).tolist() == [0.5, 0.0]
    assert rows[1].tolist() == [7, 0]
    assert rows[2].view(torch.float32).tolist() == [0.25, 1.0]
    assert rows[3].view(torch.float32).tolist() == [0.75, 0.0]


def test_no_rows():
    rows = rows_of([])
    assert rows.shape == (ROWS, 0) and rows.dtype == torch.int32
    assert sample(torch.empty(0, 5), rows).shape == (0,)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_logprobs_are_those_of_a_softmax_in_fp64(scale):
    logits = scale * torch.randn(6, 500)
    logits[0, :499] = -INF
    tokens = torch.tensor([499, 0, 1, 250, 499, 17])
    found = logprobs_of(logits, tokens)
    expected = logits.double().log_softmax(-1)[torch.arange(6), tokens]
    assert found.dtype == torch.float32 and found.shape == (6,)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_on_a_gpu_the_same_tokens_are_drawn():
    """But where a draw is so near a border that the last bit of a probability decides."""
    logits = 3 * torch.randn(64, 50_000)
    settings = [GREEDY if i % 4 == 0 else Settings(0.8, 50 * (i % 3), 0.5 + i / 128, draw("s", i)) for i in range(64)]
    rows = rows_of(settings)
    on_gpu = sample(logits.cuda(), rows.cuda()).cpu()
    near = [
        sample(logits, rows_of([one._replace(**{name: getattr(one, name) + by}) for one in settings]))
        for name in ("top_p", "draw")
        for by in (-1e-4, 0, 1e-4)
    ]
    clear = (torch.stack(near) == near[1]).all(0)
    assert clear.sum() > 30
    assert on_gpu[clear].equal(near[1][clear])
    for i in range(64):
        assert sample(logits[i : i + 1].cuda(), rows[:, i : i + 1].cuda()).cpu().equal(on_gpu[i : i + 1])
