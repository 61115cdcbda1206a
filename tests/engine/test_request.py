"""Requests: what cannot be is refused by name, with its remedy; what can be becomes plain Python."""

import math
import sys
from collections import UserDict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.engine.request import stop_strings, stop_tokens, token_ids
from lorakit.errors import RequestError

VOCABULARY = 1000
REQUEST = replace(plain.REQUEST, temperature=0.5)
HUGE = 10**5000  # too long for repr

BAD = {
    "max_new_tokens": [0, -1, 1.0, 2.5, True, "8", None, math.nan, HUGE * -1, torch.tensor(3), np.float32(3), [8]],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True, HUGE, np.float32("nan"), 1j, torch.tensor(1.0)],
    "top_k": [-1, 0.5, True, "5", None, 2**31, HUGE],
    "top_p": [0, 0.0, -0.5, 1.0001, math.nan, math.inf, "0.5", None, True],
    "seed": [-1, 2**64, HUGE, 0.5, "0", True, math.nan],
    "logprobs": [5, 0, 1, "yes", None],
    "top_logprobs": [-1, 21, 1.5, "yes", None, True],
    "n": [0, -1, 129, 1.0, "1", True, None],
    "deadline": [0, -1, math.nan, math.inf, "1", True, HUGE],
    "tenant": [None, 5, b"a", ("a",)],
}


def short(value):
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]], ids=short)
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=rf"^{name} is .*; give ") as caught:
        replace(REQUEST, **{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("max_new_tokens", np.int64(5), 5),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.int8(2), 2.0),
        ("temperature", Fraction(1, 4), 0.25),
        ("top_k", np.uint8(3), 3),
        ("top_k", 2**31 - 1, 2**31 - 1),
        ("top_p", 1, 1.0),
        ("top_p", 1e-300, 1e-300),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("n", np.int32(128), 128),
        ("deadline", 1e-3, 1e-3),
        ("deadline", None, None),
        ("tenant", "", ""),
    ],
)
def test_what_can_be_becomes_plain(name, value, plain):
    found = getattr(replace(REQUEST, **{name: value}), name)
    assert found == plain and type(found) is type(plain)


def test_several_greedy_sequences_are_refused():
    with pytest.raises(RequestError, match="n=2 .* raise the temperature"):
        replace(REQUEST, n=2, temperature=0)


@pytest.mark.parametrize(
    "prompt",
    [
        [3, 1, 2],
        (3, 1, 2),
        range(3, 6),
        (token for token in [3, 1, 2]),
        map(int, "312"),
        torch.tensor([3, 1, 2]),
        torch.tensor([[3, 1, 2]]),
        torch.tensor([3, 1, 2], dtype=torch.int16),
        list(torch.tensor([3, 1, 2])),
        np.array([3, 1, 2]),
        np.array([[3, 1, 2]], dtype=np.uint8),
        list(np.array([3, 1, 2])),
        [3, np.int64(1), 2],
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_prompts_of_every_kind_become_tuples(prompt):
    found = token_ids(prompt, VOCABULARY)
    assert found in ((3, 1, 2), (3, 4, 5))
    assert type(found) is tuple and {type(token) for token in found} == {int}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty; give at least one token"),
        (iter([]), "the prompt is empty"),
        (torch.tensor([]), "the prompt is empty"),
        (torch.empty(1, 0), "the prompt is empty"),
        (None, "the prompt is a NoneType; give token ids"),
        (5, "the prompt is a int; give token ids"),
        ("hello", "the prompt is a str; give token ids, as a tokenizer makes them"),
        (b"hello", "the prompt is a bytes; give token ids"),
        ({1, 2}, "the prompt is a set; give token ids"),
        ({"input_ids": [1], "attention_mask": [1]}, "the prompt is a dict; give its input_ids"),
        (UserDict(input_ids=[1]), "the prompt is a UserDict; give its input_ids"),
        ({1: 2}, "the prompt is a dict; give token ids"),
        (torch.tensor(5), r"the prompt has the shape \(\); give the token ids of one row"),
        (np.array(5), r"the prompt has the shape \(\)"),
        (torch.ones(2, 3, dtype=torch.int64), r"the prompt has the shape \(2, 3\); give the token ids of one row"),
        (torch.ones(1, 1, 3, dtype=torch.int64), r"the prompt has the shape \(1, 1, 3\)"),
        (np.ones((2, 3), dtype=int), r"the prompt has the shape \(2, 3\)"),
        (torch.tensor([1.0, 2.0]), r"the prompt holds 1.0 at 0; token ids are whole numbers"),
        (torch.tensor([True]), "the prompt holds True at 0"),
        (np.array([1.5]), "the prompt holds 1.5 at 0"),
        (np.array(["a"]), "the prompt holds 'a' at 0"),
        ([np.True_], "the prompt holds np.True_ at 0"),
        ([[1, 2, 3]], r"the prompt holds \[1, 2, 3\] at 0"),
        ([1, "2"], "the prompt holds '2' at 1"),
        ([1, None], "the prompt holds None at 1"),
        ([1, 2, True], "the prompt holds True at 2"),
        ([1, 2.0], "the prompt holds 2.0 at 1"),
        ([1, math.nan], "the prompt holds nan at 1"),
        ([1, torch.tensor(0.5)], r"the prompt holds tensor\(0.5000\) at 1"),
        ([1, -1], r"the prompt holds the token -1 at 1, but ids are 0 to 999; was it made by another"),
        ([999, 1000, -7], "the prompt holds the token 1000 at 1"),
        ([0, HUGE], "the prompt holds the token a very large int at 1"),
        (["x" * 100_000], "…"),
    ],
    ids=short,
)
def test_what_is_no_prompt_is_refused_with_the_place(prompt, message):
    with pytest.raises(RequestError, match=message) as caught:
        token_ids(prompt, VOCABULARY)
    assert len(str(caught.value)) < 300


@given(st.lists(st.one_of(st.integers(-2, 12), st.booleans(), st.floats(), st.none()), max_size=8))
def test_a_prompt_is_taken_just_where_all_of_it_are_ids(values):
    right = bool(values) and all(type(value) is int and 0 <= value < 10 for value in values)
    try:
        assert token_ids(values, 10) == tuple(values) and right
    except RequestError:
        assert not right


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, iter], ids=["list", "tensor", "array", "iterator"])
def test_a_long_prompt_is_checked_without_a_call_for_each_token(kind):
    prompt = kind(list(range(100_000)))
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        found = token_ids(prompt, 100_000)
    finally:
        sys.setprofile(None)
    # Others may have a say when Python's collector runs.
    assert len(found) == 100_000 and len(calls) < 10_000


@pytest.mark.parametrize(
    ("stop", "found"),
    [
        (None, set()),
        ([], set()),
        ((), set()),
        (set(), set()),
        (iter([]), set()),
        (torch.tensor([], dtype=torch.int64), set()),
        (0, {0}),
        (7, {7}),
        (np.int64(7), {7}),
        (torch.tensor(7), {7}),
        ([7, 8, 7], {7, 8}),
        ({7, 8}, {7, 8}),
        (frozenset({7}), {7}),
        (np.array([7, 8]), {7, 8}),
        (torch.tensor([7, 8]), {7, 8}),
        ((token for token in (7, 8)), {7, 8}),
    ],
)
def test_stop_tokens_of_every_kind(stop, found):
    tokens = stop_tokens(stop, VOCABULARY)
    assert tokens == found and type(tokens) is frozenset and {type(token) for token in tokens} <= {int}


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("</s>", "stop_token_ids is a str; give token ids"),
        (1.5, "stop_token_ids is a float; give token ids"),
        (True, "stop_token_ids holds True at 0"),
        ([True], "stop_token_ids holds True at 0"),
        (["</s>"], "stop_token_ids holds '</s>' at 0"),
        (-1, "stop_token_ids holds the token -1 at 0"),
        ([5, 1000], "stop_token_ids holds the token 1000 at 1"),
        ({5: 6}, "stop_token_ids is a dict"),
    ],
)
def test_what_is_no_stop_token_is_refused(stop, message):
    with pytest.raises(RequestError, match=message):
        stop_tokens(stop, VOCABULARY)


@pytest.mark.parametrize(
    ("stop", "found"),
    [
        (None, ()),
        ([], ()),
        ("end", ("end",)),
        (["a", "b"], ("a", "b")),
        (("é",), ("é",)),
        ((text for text in "ab"), ("a", "b")),
        (["x" * 512] * 64, ("x" * 512,) * 64),
    ],
)
def test_stop_strings_of_every_kind(stop, found):
    assert stop_strings(stop) == found


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "stop holds ''; give texts of at least one character"),
        (["a", ""], "stop holds ''"),
        (["a", None], "stop holds None"),
        (["a", 5], "stop holds 5"),
        ([["a"]], r"stop holds \['a'\]"),
        (5, "stop is 5; give a text, or a list of texts"),
        (True, "stop is True"),
        (b"end", "stop is b'end'; give a text"),
        ([b"end"], "stop holds b'end'"),
        ({"a": 1}, "stop is {'a': 1}"),
        (["a"] * 65, "stop holds 65 texts; give at most 64"),
        ("é" * 257, "of 514 bytes; give texts of at most 512"),
    ],
)
def test_what_is_no_stop_string_is_refused(stop, message):
    with pytest.raises(RequestError, match=message):
        stop_strings(stop)
