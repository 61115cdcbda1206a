"""A sequence's tokens → its text, piece by piece.

A character may lie in several tokens and a stop string in several pieces, so what may still change is held back.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.engine.stopping import UNFINISHED, Decode

_BEFORE = 6  # tokens, or more, that are decoded again with the new ones: some decoders join words by what stands before
_PATIENCE = 16  # tokens after which what is no whole character is taken for what it is: models write such, too


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
        # Where whole texts ended, as token counts: what is decoded again begins at the first, as in the middle of a
        # character some decoders give up all of its neighbours; what was read ends at the last.
        self._ends = [0]
        self._held = ""
        self._stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Takes tokens, and gives the text that will not change any more."""
        return "".join(map(self._add, tokens))

    def _add(self, token: int) -> str:
        self._tokens.append(token)
        now = self._decode(self._tokens[self._ends[0] :])
        if now.endswith(UNFINISHED) and len(self._tokens) - self._ends[-1] < _PATIENCE:
            return ""
        new = now[len(self._before()) :]
        self._ends.append(len(self._tokens))
        while len(self._ends) > 1 and self._ends[1] <= len(self._tokens) - _BEFORE:
            del self._ends[0]
        return self._give(new, is_last=False)

    def finish(self) -> str:
        """Gives what was held back: nothing follows."""
        return self._give(self._decode(self._tokens[self._ends[0] :])[len(self._before()) :], is_last=True)

    def _before(self) -> str:
        """What was read of what is decoded again."""
        return self._decode(self._tokens[self._ends[0] : self._ends[-1]])

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
