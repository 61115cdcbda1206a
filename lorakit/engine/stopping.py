"""Stop strings: does the text of what was generated hold one?

Tokens do not end where texts do, so the tail of the tokens is put into text anew for each token; how, the engine is
told. Knows token ids and a function that decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorakit.engine.checks import shown
from lorakit.errors import EngineError

Decode = Callable[[Sequence[int]], str]
"""Token ids → their text, special tokens left out."""

_SPARE = 12
"""Tokens looked at beside one a byte of the longest stop string: some have no text, and a character's bytes may lie in
several."""

UNFINISHED = "�"
"""What decoders write for bytes that are no whole character, or not yet."""

_LONGEST = 4  # tokens of a character, a byte each


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
        longest = max((len(text.encode(errors="surrogatepass")) for text in strings), default=0)
        self._window = longest + _SPARE

    def found(self, tokens: Sequence[int]) -> str | None:
        """The stop string that the newest tokens complete; of several the one that begins first.

        Args:
            tokens: all that was generated.

        Raises:
            EngineError: `decode` failed; its error is the cause.
        """
        if not self._strings:
            return None
        window = tokens[-self._window :]
        # Whatever a caller's function does, it must not end the loop for others.
        try:
            text = self._text(window)
        except Exception as error:
            raise EngineError(
                f"the engine's decode makes no text of the tokens {shown(list(window))}: {type(error).__name__}: "
                f"{error}. Give it one that takes every token of the model's, or no stop strings."
            ) from error
        return min((stop for stop in self._strings if stop in text), key=text.index, default=None)

    def _text(self, window: Sequence[int]) -> str:
        """The window's text. It may begin within a character, and then some decoders give up all of its neighbours."""
        text = ""
        for first in range(min(_LONGEST, len(window))):
            text = self._decode(window[first:])
            if not isinstance(text, str):  # batch_decode's list
                raise TypeError(f"it gave {shown(text)}")
            if not text.startswith(UNFINISHED):
                break
        return text
