"""Stop strings: found with the token that completes them, however the text is cut into tokens."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lorakit.engine.stopping import StopStrings
from lorakit.errors import EngineError

SPECIAL = 0


class Pieces:
    """A vocabulary of pieces of bytes, made as they come; token 0 is special and has no text."""

    def __init__(self):
        self.pieces = [b""]
        self.decoded = []

    def tokens(self, *pieces):
        found = []
        for piece in pieces:
            piece = piece.encode() if isinstance(piece, str) else piece
            if piece not in self.pieces:
                self.pieces.append(piece)
            found.append(self.pieces.index(piece))
        return found

    def decode(self, tokens):
        self.decoded.append(len(tokens))
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def ends(stopping, tokens):
    """After how many tokens a stop string is found, and which."""
    for count in range(1, len(tokens) + 1):
        found = stopping.found(tokens[:count])
        if found is not None:
            return count, found
    return None


@pytest.mark.parametrize(
    ("pieces", "stops", "end"),
    [
        (["Hello", " wor", "ld", "!"], ["world"], (3, "world")),
        (["Hello", " wor", "ld", "!"], ["World"], None),
        (["a", "b", "END", "c"], ["END"], (3, "END")),
        (["aE", "N", "D c"], ["END"], (3, "END")),
        (["E", "N", "E", "N", "D"], ["END"], (5, "END")),
        (["E", "E", "E", "N", "D"], ["END"], (5, "END")),
        (["a", "ENDEND"], ["END"], (2, "END")),
        (["ab", "ab", "ab", "ab"], ["abababab"], (4, "abababab")),
        (["\n", "\n"], ["\n\n"], (2, "\n\n")),
        # Of several the one that is complete first; of those that one token completes, the one that begins first.
        (["x", "b", "ab"], ["ab", "b"], (2, "b")),
        (["x", "\n\nUser:"], ["User:", "\n"], (2, "\n")),
        (["x", "abc"], ["bc", "abc", "ab"], (2, "abc")),
        # Characters of several bytes, each in a token of its own.
        ([b"\xc3", b"\xa9"], ["é"], (2, "é")),
        (["x", b"\xf0", b"\x9f", b"\x98", b"\x80", "y"], ["😀"], (5, "😀")),
        (["x", b"\xf0\x9f", b"\x98\x80y"], ["😀"], (3, "😀")),
        ([b"\xc3", b"\xa9", b"\xc3", b"\xa8"], ["éè"], (4, "éè")),
        ([b"\xc3", b"\xa8", b"\xc3", b"\xa9"], ["é"], (4, "é")),
        ([b"\xe2\x82", b"\xe2\x82", b"\xac"], ["€"], (3, "€")),
        # Special tokens have no text.
        (["st", b"", "op"], ["stop"], (3, "stop")),
        ([b"", b"", "s", b"", "t", b"", b"", "o", b"", "p", b""], ["stop"], (10, "stop")),
        ([b"", b"", b""], ["stop"], None),
    ],
)
def test_the_token_that_completes_a_stop_string_ends(pieces, stops, end):
    toy = Pieces()
    assert ends(StopStrings(stops, toy.decode), toy.tokens(*pieces)) == end


CHARACTERS = "abé€😀"


@st.composite
def cut_texts(draw):
    """A text's bytes cut anywhere, with special tokens between."""
    data = draw(st.text(CHARACTERS, max_size=30)).encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=40)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(cut_texts(), st.lists(st.text(CHARACTERS, min_size=1, max_size=6), min_size=1, max_size=4))
@example([b"a"] * 30 + [b"b"], ["aaaaab"])
@example([b"\xf0", b"\x9f", b"\x98", b"\x80"] * 6, ["😀" * 6])
def test_it_ends_just_where_the_whole_text_first_holds_one(pieces, stops):
    """Against the whole text after every token; of tokens without text there are fewer than may be overlooked."""
    pieces = [piece for place, piece in enumerate(pieces) if piece or place % 5 == 0]
    toy = Pieces()
    tokens = toy.tokens(*pieces)
    expected = None
    for count in range(1, len(tokens) + 1):
        held = [stop for stop in stops if stop in toy.decode(tokens[:count])]
        if held:
            expected = count
            break
    end = ends(StopStrings(stops, toy.decode), tokens)
    assert (end and end[0]) == expected
    assert end is None or end[1] in held


def test_the_cost_of_a_token_does_not_grow_with_the_sequence():
    toy = Pieces()
    tokens = toy.tokens(*(f"w{i} " for i in range(2000)))
    stopping = StopStrings(["the end", "é" * 10], toy.decode)
    assert ends(stopping, tokens) is None
    assert max(toy.decoded) == 20 + 12 and len(toy.decoded) == 2000


def test_without_stop_strings_nothing_is_decoded():
    toy = Pieces()
    assert StopStrings([], toy.decode).found([1, 2, 3]) is None and not toy.decoded


@pytest.mark.parametrize("text", ["stop\ud800", "\ud800"])
def test_a_text_that_no_tokenizer_makes_is_never_found(text):
    toy = Pieces()
    assert ends(StopStrings([text], toy.decode), toy.tokens("stop", b"\xed\xa0\x80")) is None


@pytest.mark.parametrize("answer", [None, ["s", "t"], 5])
def test_a_decode_that_gives_no_text_is_named(answer):
    with pytest.raises(EngineError, match=r"decode makes no text of the tokens \[7\]: TypeError: it gave "):
        StopStrings(["stop"], lambda tokens: answer).found([7])


def test_a_decode_that_fails_is_named_with_its_error():
    def decode(tokens):
        raise KeyError(f"no token {tokens[-1]}")

    with pytest.raises(EngineError, match="KeyError: 'no token 9'. Give it one that takes every token") as caught:
        StopStrings(["stop"], decode).found(list(range(10)))
    assert isinstance(caught.value.__cause__, KeyError)


def byte_level():
    """As SmolLM2's and Llama 3's: a byte is a character of GPT-2's table."""
    characters = {"Ġ": 0, "a": 1, "Ã": 2, "©": 3, "Ċ": 4, "stop": 5, "Ġst": 6, "op": 7}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def byte_fallback():
    """As Llama 2's and Gemma's: ▁ is a space, and bytes are tokens of their own."""
    pieces = {"<unk>": 0, "▁": 1, "a": 2, "<0xC3>": 3, "<0xA9>": 4, "▁stop": 5, "▁st": 6, "op": 7}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "stop", "end"),
    [
        (byte_level(), [1, 6, 7, 1], " stop", 3),
        (byte_level(), [1, 0, 5], " stop", 3),
        (byte_level(), [1, 2, 3, 1], "é", 3),
        (byte_level(), [1, 2, 1, 3], "é", None),
        (byte_level(), [1, 4, 4], "\n\n", 3),
        (byte_level(), [1, 6, 8, 7], "stop", 4),
        (byte_fallback(), [2, 6, 7, 2], " stop", 3),
        (byte_fallback(), [2, 5], "a stop", 2),
        (byte_fallback(), [2, 3, 4, 2], "é", 3),
        (byte_fallback(), [2] * 20 + [1, 6, 7], "  stop", 23),
        (byte_fallback(), [2, 6, 8, 7], "stop", 4),
        # The space that a text begins with is none of it.
        (byte_fallback(), [5], " stop", None),
        (byte_fallback(), [5], "stop", 1),
    ],
)
def test_tokenizers_of_both_kinds(tokenizer, tokens, stop, end):
    found = ends(StopStrings([stop], tokenizer.decode), tokens)
    assert found == (end and (end, stop))
    whole = [count for count in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:count])]
    assert (whole[0] if whole else None) == end


def by_fallback(tokens):
    """As tokenizers with a fallback to bytes decode: a run of them with one too few is given up whole."""
    return bytes(tokens).decode() if _is_whole(tokens) else "�" * len(tokens)


def _is_whole(tokens):
    try:
        bytes(tokens).decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_window_that_begins_within_a_character_is_no_hindrance():
    stops = StopStrings(["😂"], by_fallback)
    text = ("日😀" * 6 + "😂").encode()
    found = [stops.found(list(text[:end])) for end in range(1, len(text) + 1)]
    assert found[-1] == "😂" and not any(found[:-1])
