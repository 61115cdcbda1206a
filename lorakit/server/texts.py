"""A sequence's tokens → its text, piece by piece.

A character may lie in several tokens and a stop string in several pieces, so what may still change is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids → their text."""

_UNFINISHED = "�"  # what decoders write for bytes that are no whole character yet
_BEFORE = 6  # tokens that are decoded again with the new ones: some decoders join words by what stands before


class TextStream:
    """The text of one sequence.

    Attributes:
        text: what has been given away.
    """

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        """Has nothing yet.

        Args:
            decode: makes text of tokens.
            stops: what must not be in the text, nor what comes after it.
        """
        self.text = ""
        self._decode = decode
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._start = self._read = 0  # tokens that are decoded again, and that were read
        self._held = ""
        self._stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Takes tokens, and gives the text that will not change any more."""
        self._tokens += tokens
        before = self._decode(self._tokens[self._start : self._read])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_UNFINISHED):
            return ""
        self._start, self._read = max(self._start, len(self._tokens) - _BEFORE), len(self._tokens)
        return self._give(now[len(before) :], is_last=False)

    def finish(self) -> str:
        """Gives what was held back: nothing follows."""
        before = self._decode(self._tokens[self._start : self._read])
        return self._give(self._decode(self._tokens[self._start :])[len(before) :], is_last=True)

    def _give(self, new: str, *, is_last: bool) -> str:
        if self._stopped:
            return ""
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self._stopped = True
            given = self._held[: min(found)]
        else:
            given = self._held if is_last else self._held[: len(self._held) - self._may_begin_a_stop()]
        self._held = self._held[len(given) :]
        self.text += given
        return given

    def _may_begin_a_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        most = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(most, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
