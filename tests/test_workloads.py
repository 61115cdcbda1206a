"""Workloads have the shares, the means and the shapes that their papers name, and a seed repeats them."""

import math
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit import workloads
from lorakit.errors import ConfigError
from lorakit.workloads import POPULARITIES, Asked, group_sizes


def rng(seed=0):
    return random.Random(seed)


@given(st.integers(1, 3000), st.sampled_from(POPULARITIES))
def test_every_request_has_an_adapter_and_the_most_popular_come_first(requests, popularity):
    sizes = group_sizes(requests, popularity)
    assert sum(sizes) == requests and min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)
    assert Counter(workloads.adapters_of(requests, popularity, rng())) == dict(enumerate(sizes))


def test_the_four_popularities():
    assert group_sizes(5, "distinct") == [1] * 5
    assert group_sizes(5, "identical") == [5]
    assert group_sizes(64, "uniform") == [8] * 8
    assert group_sizes(65, "uniform") == [8, 8, 7, 7, 7, 7, 7, 7, 7]
    assert group_sizes(32, "skewed") == [11, 7, 5, 3, 2, 2, 1, 1]
    with pytest.raises(ConfigError, match=r"no popularity 'zipf'; there are distinct"):
        group_sizes(5, "zipf")


def test_a_power_laws_shares_fall_with_the_rank():
    found = Counter(workloads.power_law(200_000, 10, 1.0, rng()))
    expected = [1 / i for i in range(1, 11)]
    for adapter, share in enumerate(expected):
        assert found[adapter] / 200_000 == pytest.approx(share / sum(expected), rel=0.03)
    assert max(Counter(workloads.power_law(100_000, 10, 0.0, rng())).values()) < 10_500


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_arrivals_have_their_rate_and_their_spread(cv):
    arrivals = workloads.gamma_arrivals(100_000, 5.0, rng(), cv=cv)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.03)


def test_wave_arrivals_rise_and_fall():
    arrivals = workloads.wave_arrivals(50.0, 1000.0, rng())
    assert arrivals == sorted(arrivals) and arrivals[0] > 0 and arrivals[-1] < 1000
    rate = [sum(begin <= one < begin + 100 for one in arrivals) / 100 for begin in range(0, 1000, 100)]
    for tenth, found in enumerate(rate):
        middle = (tenth + 0.5) / 10
        assert found == pytest.approx(50 * (1.2 - math.cos(2 * math.pi * middle)) / 2.2, abs=2.5)


def test_lengths_are_in_their_ranges():
    draws = {name: [getattr(workloads, name)(one) for one in [rng()] for _ in range(20_000)] for name in LENGTHS}
    assert all(prompt >= 1 and new >= 1 for pairs in draws.values() for prompt, new in pairs)
    prompts, answers = zip(*draws["punica_lengths"], strict=True)
    assert statistics.mean(prompts) == pytest.approx(24, abs=1)
    assert all(prompt + new <= 2048 or new == 1 for prompt, new in draws["punica_lengths"])
    assert statistics.mean(answers) == pytest.approx(1000, abs=20)
    prompts, answers = zip(*draws["chat_lengths"], strict=True)
    assert statistics.median(prompts) == pytest.approx(math.exp(3.89), rel=0.05)
    assert statistics.median(answers) == pytest.approx(math.exp(5.25), rel=0.05)
    assert {min(one) for one in zip(*draws["slora_lengths"], strict=True)} == {8}
    assert {max(one) for one in zip(*draws["slora_lengths"], strict=True)} == {511}


LENGTHS = ("punica_lengths", "chat_lengths", "slora_lengths")


def test_a_seed_repeats_a_trace_and_a_file_gives_it_back(tmp_path):
    def made(seed):
        one = rng(seed)
        arrivals = workloads.gamma_arrivals(50, 3.0, one)
        return workloads.trace(arrivals, workloads.adapters_of(50, "skewed", one), workloads.chat_lengths, one)

    assert made(1) == made(1) != made(2)
    workloads.write_trace(made(1), tmp_path / "trace.jsonl")
    assert workloads.read_trace(tmp_path / "trace.jsonl") == made(1)


def test_a_trace_is_read_in_the_order_of_arrival_and_may_say_more(tmp_path):
    lines = [
        '{"arrival": 2, "adapter": 1, "prompt_tokens": 3, "new_tokens": 4, "tenant": "x"}',
        "",
        '{"arrival": 0.5, "adapter": 0, "prompt_tokens": 1, "new_tokens": 1}',
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    assert workloads.read_trace(tmp_path / "trace.jsonl") == [Asked(0.5, 0, 1, 1), Asked(2, 1, 3, 4)]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1, 2]",
        '{"arrival": 1}',
        '{"arrival": -1, "adapter": 0, "prompt_tokens": 1, "new_tokens": 1}',
        '{"arrival": NaN, "adapter": 0, "prompt_tokens": 1, "new_tokens": 1}',
        '{"arrival": 1, "adapter": "a", "prompt_tokens": 1, "new_tokens": 1}',
        '{"arrival": 1, "adapter": 0, "prompt_tokens": 0, "new_tokens": 1}',
        '{"arrival": 1, "adapter": 0, "prompt_tokens": 1.5, "new_tokens": 1}',
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    good = '{"arrival": 0, "adapter": 0, "prompt_tokens": 1, "new_tokens": 1}\n'
    (tmp_path / "trace.jsonl").write_text(good + line)
    with pytest.raises(ConfigError, match=r"trace\.jsonl:2: this is no request of a trace"):
        workloads.read_trace(tmp_path / "trace.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        workloads.read_trace(tmp_path / "missing.jsonl")
