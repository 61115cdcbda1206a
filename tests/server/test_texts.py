"""Text of tokens as they come: the same as of all at once, nothing of a stop string, and as early as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.texts import TextStream


def decode(tokens):
    """A token is a byte."""
    return bytes(tokens).decode(errors="replace")


def streamed(tokens, stops=(), pieces=1):
    stream, found = TextStream(decode, stops), []
    for start in range(0, len(tokens), pieces):
        found.append(stream.add(tokens[start : start + pieces]))
    found.append(stream.finish())
    assert stream.text == "".join(found)
    return found


@given(st.text(max_size=20), st.integers(1, 5))
def test_pieces_are_the_whole_text(text, pieces):
    assert "".join(streamed(text.encode(), pieces=pieces)) == text


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_the_first_stop_string_ends_it(text, stops, pieces):
    found = "".join(streamed(text.encode(), stops, pieces))
    places = [text.index(stop) for stop in stops if stop in text]
    if not places:
        assert found == text
    elif pieces == 1:
        # The engine ends where one is complete: of several, the one that is complete first.
        end = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert found == text[: min(text[:end].index(stop) for stop in stops if stop in text[:end])]
    else:
        assert text.startswith(found) and not any(stop in found for stop in stops)


def by_fallback(tokens):
    """As tokenizers with a fallback to bytes decode (Llama 2's): a run with a byte too few is given up whole."""
    text, run = "", b""
    for token in [*tokens, None]:
        if token is not None and token >= 128:
            run += bytes([token])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "�" * len(run)
        text, run = text + ("" if token is None else chr(token)), b""
    return text


@given(st.text("a日😀é", max_size=30))
def test_a_run_of_characters_of_several_tokens_is_never_begun_in_the_middle(text):
    stream = TextStream(by_fallback, ())
    assert "".join(stream.add([token]) for token in text.encode()) + stream.finish() == text


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("añb", (), ["a", "", "ñ", "b", ""]),
        ("ab", ("xy",), ["a", "b", ""]),
        ("axb", ("xy",), ["a", "", "xb", ""]),
        ("axy", ("xy",), ["a", "", "", ""]),
        ("ax", ("xy",), ["a", "", "x"]),
    ],
)
def test_only_what_may_still_change_is_held_back(text, stops, found):
    assert streamed(text.encode(), stops) == found


def test_bytes_that_never_become_a_character_are_told_in_the_end():
    assert streamed(b"a\xc3") == ["a", "", "�"]
