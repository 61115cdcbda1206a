"""Stop strings: does the text of what was generated hold one?

Tokens do not end where texts do, so the tail of the tokens is put into text anew for each token; how, the engine is
told. Knows token ids and a function that decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids → their text, special tokens left out."""

_SPARE = 8
"""Tokens looked at beside one a byte of the longest stop string: a character's bytes may lie in several tokens."""


class StopStrings:
    """The stop strings of one sequence."""

    def __init__(self, strings: Sequence[str], decode: Decode) -> None:
        """Looks for nothing yet.

        Args:
            strings: texts that end it, none empty.
            decode: makes text of tokens.
        """
        self._strings = tuple(strings)
        self._decode = decode
        # A token has at least a byte of text, or none at all (a special one).
        self._window = max((len(text.encode()) for text in strings), default=0) + _SPARE

    def found(self, tokens: Sequence[int]) -> str | None:
        """The stop string that the newest tokens complete.

        Args:
            tokens: all that was generated.
        """
        if not self._strings:
            return None
        text = self._decode(tokens[-self._window :])
        return next((stop for stop in self._strings if stop in text), None)
