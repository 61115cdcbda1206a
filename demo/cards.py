"""Answers side by side, a card a tenant, as they come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from lorakit.engine.handle import RequestHandle
from lorakit.engine.stopping import Decode
from lorakit.server.texts import TextStream

from .batch_view import colour
from .stage import BASE


class Card:
    """One tenant's answer."""

    def __init__(self, name: str, handle: RequestHandle, decode: Decode) -> None:
        """Has nothing yet.

        Args:
            name: the tenant's.
            handle: its request.
            decode: makes text of tokens.
        """
        self._name, self._handle = name, handle
        self._stream = TextStream(decode, ())
        self._seen = 0
        self._first: float | None = None
        self._last = 0.0

    @property
    def done(self) -> bool:
        """Whether it will not change any more."""
        return self._handle.done

    def draw(self, tenants: Sequence[str]) -> str:
        """The card as it is now."""
        done, tokens = self._handle.done, self._handle.tokens()
        new = [token.id for token in tokens[self._seen :]]
        if new:
            self._last = time.monotonic() - self._handle.submitted
            self._first = self._last if self._first is None else self._first
            self._seen += len(new)
            self._stream.add(new)
        if done:
            self._stream.finish()
        error = self._handle.error
        body = f'<p class="error" role="alert">{escape(str(error))}</p>' if error else self._text(done)
        kind = "the base alone" if self._name == BASE else "adapter"
        look = f'style="--tenant:{colour(self._name, list(tenants))}" aria-busy="{str(not done).lower()}"'
        look += f' data-request="{self._handle.id}"'
        head = f"<header><b>{escape(self._name)}</b> <span>{kind}</span></header>"
        return f"<article {look}>{head}{body}<footer>{self._told()}</footer></article>"

    def _text(self, done: bool) -> str:
        text = self._stream.text.strip()
        return f'<div class="text">{escape(text)}{"" if done else "<i>▍</i>"}</div>'

    def _told(self) -> str:
        first, last, completion = self._first, self._last, self._handle.completion()
        if completion is not None and completion.times:  # more exact than what was seen of it
            first, last = completion.times[0], completion.times[-1]
        if first is None:
            return "" if self._handle.done else "waiting"
        rate = f" · {(self._seen - 1) / (last - first):.1f} tokens/s" if self._seen > 2 and last > first else ""
        return f"{self._seen} tokens · first after {first:.2f} s{rate}"


def draw(cards: Sequence[Card], tenants: Sequence[str]) -> str:
    """All of them, as HTML."""
    return f'<div class="cards" aria-live="polite">{"".join(card.draw(tenants) for card in cards)}</div>'
