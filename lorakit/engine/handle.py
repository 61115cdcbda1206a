"""What a caller holds of its request: tokens as they come, in a thread or in asyncio, and the end.

The engine's thread writes, any number of threads and event loops read. Every request ends: with its tokens, or with an
error. Knows tokens; no model and no batch.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from lorakit.engine.request import Request

FinishReason = Literal["stop", "length", "cancelled"]


class Likely(NamedTuple):
    """A token that could have been drawn.

    Attributes:
        id: the token.
        logprob: its logarithmic probability.
    """

    id: int
    logprob: float


class Token(NamedTuple):
    """One generated token.

    Attributes:
        id: the token.
        logprob: its logarithmic probability, if it was asked for.
        sequence: which of the request's sequences it continues, counted from 0.
        top: the most likely tokens of its place, as many as were asked for.
    """

    id: int
    logprob: float | None = None
    sequence: int = 0
    top: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One finished sequence.

    Attributes:
        token_ids: what was generated, the token that ended it included.
        logprobs: of each token, if they were asked for.
        top_logprobs: the most likely tokens of each place, if they were asked for.
        finish_reason: "stop" for a stop token or string, "length" for the limit of new tokens, "cancelled".
        stop: the stop token or string that ended it.
        times: seconds from its submission until each token came.
        seconds: from its submission to its end.
        cached_tokens: of the prompt, those that the prefix cache had.
        queued: seconds from its submission until it joined the batch; None if it never did.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    stop: int | str | None
    times: tuple[float, ...]
    seconds: float
    cached_tokens: int = 0
    queued: float | None = None
    top_logprobs: tuple[tuple[Likely, ...], ...] | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from its submission; None if there is no token."""
        return self.times[0] if self.times else None


class Part(Protocol):
    """A sequence of a request, as an engine has it.

    Attributes:
        over: whether it has ended.
        joined: when it joined the batch, by `time.monotonic`; None before.
        cached: tokens of its prompt that the prefix cache had.
    """

    @property
    def over(self) -> bool: ...  # noqa: D102
    @property
    def joined(self) -> float | None: ...  # noqa: D102
    @property
    def cached(self) -> int: ...  # noqa: D102


class _Ended(NamedTuple):
    """How a sequence ended."""

    completion: Completion | None
    error: BaseException | None


class RequestHandle:
    """A request under way.

        for token in handle: ...              tokens of all its sequences, as they come
        async for token in handle: ...
        handle.result()                       waits for the end; `await handle` does too

    Any number of readers may iterate, each from the first token on. A reader that stops, or whose task is cancelled,
    leaves the request running: `cancel` ends it.

    Attributes:
        id: names it in logs.
        request: what was asked for.
        submitted: when, by `time.monotonic`.
        parts: the engine's own, one a sequence.
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
        self.parts: list[Part] = []
        self._cancel = cancel
        self._when_ended = ended
        # One lock: who waits for the end need not wake for every token.
        self._lock = threading.RLock()
        self._news = threading.Condition(self._lock)
        self._end_came = threading.Condition(self._lock)
        self._tokens: list[Token] = []
        self._of: list[list[Token]] = [[] for _ in range(request.n)]
        self._ended: dict[int, _Ended] = {}
        self._times: list[list[float]] = [[] for _ in range(request.n)]
        self._listeners: list[Listener] = []

    @property
    def done(self) -> bool:
        """Whether all its sequences have ended."""
        return len(self._ended) == self.request.n

    @property
    def generated(self) -> int:
        """The tokens that it has so far, of all sequences."""
        return len(self._tokens)

    @property
    def cached(self) -> int:
        """Tokens of its prompt that the prefix cache had, as far as is known."""
        return self.parts[0].cached if self.parts else 0

    @property
    def running(self) -> int:
        """Its sequences that are in the batch."""
        return sum(not job.over and job.joined is not None for job in self.parts)

    @property
    def waiting(self) -> int:
        """Its sequences that have not begun."""
        return sum(not job.over and job.joined is None for job in self.parts)

    @property
    def error(self) -> BaseException | None:
        """What it failed by."""
        return next((ended.error for ended in self._ended.values() if ended.error is not None), None)

    def tokens(self, sequence: int = 0, since: int = 0) -> list[Token]:
        """What a sequence has so far, without its first `since`."""
        with self._lock:
            return self._of[sequence][since:]

    def completion(self, sequence: int = 0) -> Completion | None:
        """A sequence's, if it has ended as it should; others may go on."""
        with self._lock:
            ended = self._ended.get(sequence)
            return None if ended is None else ended.completion

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
            with self._lock:
                while len(self._tokens) == seen and not self.done:
                    self._news.wait()
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
        with self._lock:
            return self._end_came.wait_for(lambda: self.done, timeout)

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

    def __await__(self) -> Generator[Any, None, Completion]:
        """The first sequence's completion, in asyncio."""
        return self._completion().__await__()

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The tokens as they come, in asyncio.

        Raises:
            LorakitError: it failed; after the tokens that there are.
        """
        seen = 0
        with self._listening(Listener()) as listener:
            while True:
                with self._lock:
                    listener.look()
                    new, done = self._tokens[seen:], self.done
                seen += len(new)
                for token in new:
                    yield token
                if not new:
                    if done:
                        break
                    await listener.news.wait()
        self._raise_error()

    async def _completion(self) -> Completion:
        with self._listening(Listener(until_the_end=True)) as listener:
            while not self.done:
                await listener.news.wait()
        return self._results()[0]

    def add(self, sequence: int, token: int, logprob: float | None, top: tuple[Likely, ...] = ()) -> None:
        """The engine has a token."""
        with self._lock:
            if sequence in self._ended:
                return
            self._times[sequence].append(time.monotonic() - self.submitted)
            new = Token(token, logprob, sequence, top)
            self._tokens.append(new)
            self._of[sequence].append(new)
            self._news.notify_all()
            for listener in self._listeners:
                if not listener.told:
                    listener.tell()

    def finish(
        self,
        sequence: int,
        reason: FinishReason,
        stop: int | str | None = None,
        *,
        cached: int = 0,
        joined: float | None = None,
    ) -> None:
        """A sequence has ended as it should.

        Args:
            sequence: which.
            reason: why.
            stop: the stop token or string.
            cached: tokens of its prompt that the prefix cache had.
            joined: when it joined the batch, by `time.monotonic`.
        """
        with self._lock:
            if sequence in self._ended:
                return
            tokens = self._of[sequence]
            logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
            completion = Completion(
                token_ids=tuple(token.id for token in tokens),
                logprobs=logprobs if self.request.logprobs else None,
                finish_reason=reason,
                stop=stop,
                times=tuple(self._times[sequence]),
                seconds=time.monotonic() - self.submitted,
                cached_tokens=cached,
                queued=None if joined is None else joined - self.submitted,
                top_logprobs=tuple(token.top for token in tokens) if self.request.top_logprobs else None,
            )
            self._end({sequence: _Ended(completion, None)})

    def fail(self, error: BaseException) -> None:
        """All that has not ended yet ends by an error."""
        with self._lock:
            self._end({sequence: _Ended(None, error) for sequence in range(self.request.n)})

    def _end(self, ended: dict[int, _Ended]) -> None:
        if self.done:
            return
        self._ended = {**ended, **self._ended}
        if not self.done:
            return  # other sequences go on, and readers have all the tokens of this one
        # Before anyone is told: a reader then finds the engine without this request.
        self._when_ended(self)
        self._news.notify_all()
        self._end_came.notify_all()
        for listener in self._listeners:
            listener.tell()

    def tell(self, listener: Listener) -> None:
        """Has a listener told of what comes, to the end; it may be told of other requests, too."""
        with self._lock:
            if self.done:
                listener.tell()
            else:
                self._listeners.append(listener)

    @contextmanager
    def _listening(self, listener: Listener) -> Iterator[Listener]:
        """Has a listener told of what comes."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.remove(listener)

    def _raise_error(self) -> None:
        for ended in self._ended.values():
            if ended.error is not None:
                raise _again(ended.error)

    def _results(self) -> list[Completion]:
        self._raise_error()
        return [ended.completion for _, ended in sorted(self._ended.items()) if ended.completion is not None]


class Listener:
    """A task of an event loop that waits for one request or many. It may be told from any thread.

    To tell a loop from another thread costs a system call; so one that was told, and has not looked since, is not told
    again.

    Attributes:
        news: set in its loop when there is something to look at.
        told: whether it need not be told of another token.
    """

    def __init__(self, *, until_the_end: bool = False) -> None:
        """Belongs to the loop that runs.

        Args:
            until_the_end: of tokens it need not know.
        """
        self.news = asyncio.Event()
        self.told = until_the_end
        self._loop = asyncio.get_running_loop()

    def look(self) -> None:
        """It looks now."""
        self.told = False
        self.news.clear()

    def tell(self) -> None:
        """There is something."""
        self.told = True
        with suppress(RuntimeError):  # the loop was closed, and nobody listens any more
            self._loop.call_soon_threadsafe(self.news.set)


def _again(error: BaseException) -> BaseException:
    """An error that several readers raise: each a copy that says the same, so that their tracebacks stay apart."""
    again = error
    try:
        again = copy.copy(error)
        is_same = type(again) is type(error) and again.args == error.args and str(again) == str(error)
    # Another library's error may not be made from its `args`.
    except Exception:  # noqa: BLE001
        is_same = False
    if not is_same:
        return error
    again.__cause__, again.__context__ = error.__cause__, error.__context__
    again.__suppress_context__ = error.__suppress_context__
    return again.with_traceback(error.__traceback__)
