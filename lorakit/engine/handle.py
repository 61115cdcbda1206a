"""What a caller holds of its request: tokens as they come, in a thread or in asyncio, and the end.

The engine's thread writes, any number of threads and event loops read. Every request ends: with its tokens, or with an
error. Knows tokens; no model and no batch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from lorakit.engine.request import Request
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.engine.job import Job

FinishReason = Literal["stop", "length", "cancelled"]


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: the token.
        logprob: its logarithmic probability, if it was asked for.
        sequence: which of the request's sequences it continues, counted from 0.
    """

    id: int
    logprob: float | None = None
    sequence: int = 0


@dataclass(frozen=True)
class Completion:
    """One finished sequence.

    Attributes:
        token_ids: what was generated, the token that ended it included.
        logprobs: of each token, if they were asked for.
        finish_reason: "stop" for a stop token or string, "length" for the limit of new tokens, "cancelled".
        stop: the stop token or string that ended it.
        time_to_first_token: seconds from its submission; None if there is no token.
        seconds: from its submission to its end.
        cached_tokens: of the prompt, those that the prefix cache had.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    stop: int | str | None
    time_to_first_token: float | None
    seconds: float
    cached_tokens: int = 0


class _Ended(NamedTuple):
    """How a sequence ended."""

    completion: Completion | None
    error: BaseException | None


class RequestHandle:
    """A request under way.

        for token in handle: ...              tokens of all its sequences, as they come
        async for token in handle: ...
        handle.result()                       waits for the end; `await handle` does too

    Any number of readers may iterate, each from the first token on.

    Attributes:
        id: names it in logs.
        request: what was asked for.
        submitted: when, by `time.monotonic`.
        jobs: the engine's own, one a sequence.
    """

    def __init__(
        self,
        id: str,
        request: Request,
        cancel: Callable[[RequestHandle], None],
        ended: Callable[[RequestHandle], None],
    ) -> None:
        """Begins to wait.

        Args:
            id: names it.
            request: what is asked for.
            cancel: tells the engine that nobody wants it any more.
            ended: tells the engine that it has ended; called once.
        """
        self.id = id
        self.request = request
        self.submitted = time.monotonic()
        self.jobs: list[Job] = []
        self._cancel = cancel
        self._when_ended = ended
        self._changed = threading.Condition()
        self._tokens: list[Token] = []
        self._ended: dict[int, _Ended] = {}
        self._first: dict[int, float] = {}
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def done(self) -> bool:
        """Whether all its sequences have ended."""
        return len(self._ended) == self.request.n

    def tokens(self, sequence: int = 0) -> list[Token]:
        """What a sequence has so far."""
        with self._changed:
            return [token for token in self._tokens if token.sequence == sequence]

    def cancel(self) -> None:
        """Ends it where it stands, at once for its readers; nothing happens if it has ended."""
        if not self.done:
            self._cancel(self)

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come.

        Raises:
            LorakitError: it failed; after the tokens that there are.
        """
        seen = 0
        while True:
            with self._changed:
                while len(self._tokens) == seen and not self.done:
                    self._changed.wait()
                new = self._tokens[seen:]
            if not new:
                self._raise_error()
                return
            seen += len(new)
            yield from new

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end of all sequences, however they end.

        Args:
            timeout: seconds, or None for as long as it takes.

        Returns:
            Whether they have ended.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def results(self, timeout: float | None = None) -> list[Completion]:
        """Waits for the end of all sequences.

        Args:
            timeout: seconds, or None for as long as it takes.

        Raises:
            TimeoutError: it has not ended; it goes on.
            LorakitError: it failed.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"request {self.id} has not ended after {timeout} s; it goes on.")
        return self._results()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end; of several sequences it gives the first. See `results`."""
        return self.results(timeout)[0]

    def __await__(self) -> Iterator[object]:
        """The first sequence's completion, in asyncio."""
        return self._completion().__await__()

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The tokens as they come, in asyncio."""
        seen = 0
        with _Listening(self) as news:
            while True:
                news.clear()
                with self._changed:
                    new, done = self._tokens[seen:], self.done
                if not new:
                    if done:
                        self._raise_error()
                        return
                    await news.wait()
                    continue
                seen += len(new)
                for token in new:
                    yield token

    async def _completion(self) -> Completion:
        async for _ in self:
            pass
        return self._results()[0]

    def add(self, sequence: int, token: int, logprob: float | None) -> None:
        """The engine has a token."""
        with self._changed:
            if sequence in self._ended:
                return
            self._first.setdefault(sequence, time.monotonic())
            self._tokens.append(Token(token, logprob, sequence))
            self._tell()

    def finish(self, sequence: int, reason: FinishReason, stop: int | str | None = None, cached: int = 0) -> None:
        """A sequence has ended as it should."""
        with self._changed:
            if sequence in self._ended:
                return
            tokens = [token for token in self._tokens if token.sequence == sequence]
            logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
            first = self._first.get(sequence)
            completion = Completion(
                token_ids=tuple(token.id for token in tokens),
                logprobs=logprobs if self.request.logprobs else None,
                finish_reason=reason,
                stop=stop,
                time_to_first_token=None if first is None else first - self.submitted,
                seconds=time.monotonic() - self.submitted,
                cached_tokens=cached,
            )
            self._end({sequence: _Ended(completion, None)})

    def fail(self, error: BaseException) -> None:
        """All that has not ended yet ends by an error."""
        with self._changed:
            self._end({sequence: _Ended(None, error) for sequence in range(self.request.n)})

    def _end(self, ended: dict[int, _Ended]) -> None:
        if not self.done:
            self._ended = {**ended, **self._ended}
            if self.done:
                self._when_ended(self)
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for loop, news in self._listeners:
            with suppress(RuntimeError):  # the loop was closed, and nobody listens any more
                loop.call_soon_threadsafe(news.set)

    def _raise_error(self) -> None:
        for ended in self._ended.values():
            if ended.error is not None:
                raise _again(ended.error)

    def _results(self) -> list[Completion]:
        self._raise_error()
        return [ended.completion for _, ended in sorted(self._ended.items()) if ended.completion is not None]


class _Listening:
    """Has an event loop told of what comes, for as long as it runs."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._listener = asyncio.get_running_loop(), asyncio.Event()

    def __enter__(self) -> asyncio.Event:
        with self._handle._changed:
            self._handle._listeners.append(self._listener)
        return self._listener[1]

    def __exit__(self, *error: object) -> None:
        with self._handle._changed:
            self._handle._listeners.remove(self._listener)


def _again(error: BaseException) -> BaseException:
    """An error that several readers raise: each a copy, so that their tracebacks do not grow into each other."""
    if isinstance(error, LorakitError):
        copy = type(error)(*error.args)
        copy.__dict__.update(error.__dict__)
        copy.__cause__ = error.__cause__
        return copy
    return error
