"""A token for each row without sorting: the same as in plain torch, which tests/engine/test_sampling.py holds to
transformers' own."""

import math

import pytest
import torch

from lorakit.engine.sampling import GREEDY, Settings, by_sorting, draw, rows_of
from lorakit_kernels import sampling

INF = float("inf")
CHUNK = 64


@pytest.fixture(params=[64, 8], ids=["lists", "counts"])
def drawn(device, monkeypatch, request):
    """Tokens of rows of logits, in chunks so small that a row has several; most of what may be drawn listed, or not."""
    monkeypatch.setattr(sampling, "_CHUNK", CHUNK)
    monkeypatch.setattr(sampling, "_TOGETHER", 2)
    monkeypatch.setattr(sampling, "_LISTED", request.param)

    def drawn(logits, settings, **options):
        rows = rows_of(settings).to(device)
        temperatures, top_ps, draws, rests = (rows[i].view(torch.float32) for i in (0, 2, 3, 4))
        return sampling.sample(logits.to(device), temperatures, rows[1], top_ps, draws, rests, **options).cpu()

    return drawn


def clear(logits, settings):
    """Tokens in plain torch, and for which rows no last bit decides which it is."""
    near = [
        by_sorting(logits, rows_of([_moved(one, name, by) for one in settings]), cuts=True)
        for name in ("top_p", "draw")
        for by in (1 - 1e-5, 1, 1 + 1e-5)
    ]
    return near[1], (torch.stack(near) == near[1]).all(0)


def _moved(setting, name, by):
    value = getattr(setting, name)
    return setting if value == 1 else setting._replace(**{name: value * by})


def same(drawn, logits, settings, least):
    expected, is_clear = clear(logits, settings)
    assert is_clear.float().mean() > least
    assert drawn(logits, settings)[is_clear].equal(expected[is_clear])


CUTS = [(0, 1.0), (7, 1.0), (1, 1.0), (0, 0.8), (0, 0.999), (3, 0.7), (100, 0.5), (1000, 0.9)]
"""Top-k up to the number of chunks, above it, and above the vocabulary; top-p; both."""


@pytest.mark.parametrize("size", [1, 40, 64, 300])
def test_the_same_tokens_as_in_plain_torch(drawn, size):
    settings = [Settings(0.8, *cut, draw("s", i)) for i in range(2) for cut in CUTS]
    settings += [GREEDY] * 2
    same(drawn, 3 * torch.randn(len(settings), size), settings, 0.9)


def test_the_same_where_many_are_equally_likely(drawn):
    settings = [Settings(1.0, *cut, (i + 0.5) / 5) for i in range(5) for cut in CUTS]
    same(drawn, torch.randint(-3, 4, (len(settings), 200)).float(), settings, 0.7)


@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 30.0, 1e308])
def test_the_same_at_any_temperature(drawn, temperature):
    settings = [Settings(temperature, *cut, (i + 0.41) / 2) for i in range(2) for cut in CUTS]
    logits = 3 * torch.randn(len(settings), 100)
    logits[:, 60:63] = 20.0
    same(drawn, logits, settings, 0.7)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7)])
def test_each_token_has_its_share_of_all_draws(drawn, top_k, top_p):
    logits = torch.tensor([[0.1, 0.2, 0.05, 0.25, 0.4]]).log()
    weights = [1 if not top_k and top_p == 1 else place in (1, 3, 4) for place in range(5)]
    expected = logits[0].exp() * torch.tensor(weights)
    count = 64
    found = drawn(logits.expand(count, -1), [Settings(1.0, top_k, top_p, (i + 0.5) / count) for i in range(count)])
    assert (found.bincount(minlength=5) - expected / expected.sum() * count).abs().max() <= 1


def test_of_equals_at_the_edge(drawn):
    """Top-k keeps all, top-p those with the smaller ids."""
    places = [i / 12 for i in range(12)]
    logits = torch.zeros(1, 200).index_fill(1, torch.tensor([5, 70, 150, 199]), 3.0)
    found = drawn(logits.expand(12, -1), [Settings(1.0, 2, 1.0, place) for place in places])
    assert set(found.tolist()) == {5, 70, 150, 199}
    found = drawn(logits.expand(12, -1), [Settings(1.0, 4, 0.6, place) for place in places])
    assert set(found.tolist()) == {5, 70, 150} and found[0] == 150, "the least likely first"


def test_tokens_far_less_likely_than_the_precision_of_fp32_sums_have_their_place(drawn):
    share = 5e-9
    logits = torch.tensor([[math.log(1 - 2 * share), math.log(share), math.log(share)]])
    positions = ((0.5 * share, 2), (0.99 * share, 2), (1.01 * share, 1), (1.99 * share, 1), (2.1 * share, 0))
    found = drawn(logits.expand(5, -1), [Settings(1.0, 0, 1.0, 1 - position) for position, _ in positions])
    assert found.tolist() == [token for _, token in positions]


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [(2, 1.0, [2, 2, 1, 1, 0]), (0, 1 - 2**-24, [1, 1, 0, 0, 0])],  # the largest fp32 below 1
)
def test_so_they_have_where_rows_are_cut(drawn, top_k, top_p, expected):
    share = 5e-8
    logits = torch.tensor([[math.log(1 - 2 * share), math.log(share), math.log(share)]])
    places = [times * share for times in (0.5, 0.9, 1.1, 1.9, 2.1)]  # the least likely first
    found = drawn(logits.expand(5, -1), [Settings(1.0, top_k, top_p, place) for place in places])
    assert found.tolist() == expected


def test_a_row_is_drawn_the_same_whatever_is_beside_it(drawn):
    logits = 3 * torch.randn(9, 150)
    settings = [Settings(0.7, *cut, draw("s", i)) for i, cut in enumerate([*CUTS, (0, 1.0)])]
    together = drawn(logits, settings)
    assert together[[0, 8]].equal(drawn(logits[[0, 8]], [settings[0], settings[8]], cuts=False))
    assert together.flip(0).equal(drawn(logits.flip(0), settings[::-1]))


def test_the_first_and_the_last_draw(drawn):
    logits = torch.tensor([[-INF, 3.0, 2.0, -200.0, 1.0, -INF]])
    least, most = 0.0, 1 - 2**-53  # in float32 the latter is 1
    for top_k, top_p, expected in ((0, 1.0, [1, 4]), (2, 1.0, [2, 1]), (0, 0.8, [2, 1]), (1, 1.0, [1, 1])):
        settings = [Settings(1.0, top_k, top_p, one) for one in (least, most)]
        assert drawn(logits.expand(2, -1), settings).tolist() == expected


@pytest.mark.parametrize("setting", [GREEDY, Settings(1.0, 0, 1.0, 0.5), Settings(0.5, 2, 0.9, 0.0)])
def test_a_broken_row_gets_some_token_and_disturbs_no_other(drawn, setting):
    broken = [[math.nan] * 4, [1.0, math.nan, 0.0, 2.0], [-INF] * 4, [INF, 0.0, INF, -INF]]
    whole = [[0.0, 1.0, 9.0, 2.0], [0.0, 9.0, 1.0, 2.0]]
    usual = Settings(1.0, 0, 0.5, 0.5)
    logits = torch.tensor([whole[0], *broken, whole[1]])
    found = drawn(logits, [usual, *[setting] * 4, usual]).tolist()
    assert found[0] == 2 and found[-1] == 1 and all(0 <= token < 4 for token in found)
    if setting == GREEDY:
        assert found[1:5] == logits[1:5].argmax(-1).tolist()


def test_of_zeros_with_either_sign_the_first_is_taken(drawn):
    assert drawn(torch.tensor([[-0.0, 0.0], [0.0, -0.0]]), [GREEDY] * 2).tolist() == [0, 0]


def test_rows_of_a_wider_tensor(drawn):
    logits = torch.randn(3, 200)
    settings = [Settings(1.0, 0, 0.9, 0.3)] * 3
    assert drawn(logits[:, :70], settings).equal(drawn(logits[:, :70].contiguous(), settings))


def test_no_rows(drawn):
    assert drawn(torch.empty(0, 5), []).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32_000, 50_257, 128_256])
def test_vocabularies_of_models(size):
    """In a CUDA graph that is replayed, too."""
    settings = [Settings(0.8, *cut, draw("s", i)) for i in range(8) for cut in CUTS]
    settings[5::8] = [GREEDY] * 8
    logits = 3 * torch.randn(len(settings), size)
    logits[::2] *= 2
    expected, is_clear = clear(logits, settings)
    assert is_clear.float().mean() > 0.8
    rows, logits = rows_of(settings).cuda(), logits.cuda()
    given = logits, rows[0].view(torch.float32), rows[1], *(rows[i].view(torch.float32) for i in (2, 3, 4))
    assert sampling.sample(*given).cpu()[is_clear].equal(expected[is_clear])
    # Other rows, which do not lie next to each other.
    within = torch.cat([given[0], given[0]], dim=1)[1:14, :size]
    found = sampling.sample(within, *(one[1:14].contiguous() for one in given[1:])).cpu()
    assert found[is_clear[1:14]].equal(expected[1:14][is_clear[1:14]])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sampling.sample(*given)
    for _ in range(3):
        graph.replay()
        assert found.cpu()[is_clear].equal(expected[is_clear])


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_broken_rows_of_a_model_disturb_no_other(value):
    size = 50_257
    settings = [Settings(0.8, *cut, draw("s", i)) for i, cut in enumerate(CUTS)] * 3
    logits = 3 * torch.randn(len(settings), size)
    logits[0], logits[9:18, 1000:5000] = value, value
    expected, is_clear = clear(logits, settings)
    is_clear[[0, *range(9, 18)]] = False
    assert is_clear.float().mean() > 0.4
    rows = rows_of(settings).cuda()
    found = sampling.sample(
        logits.cuda(), rows[0].view(torch.float32), rows[1], *(rows[i].view(torch.float32) for i in (2, 3, 4))
    ).cpu()
    assert found[is_clear].equal(expected[is_clear])
    assert ((found >= 0) & (found < size)).all()
