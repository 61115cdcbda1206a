"""Requests under way → OpenAI's answers, at once or as a stream of events.

A route may ask for several prompts (completions do): each is a request of the engine with `n` sequences, and choices
are counted over all of them.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from lorakit.engine.handle import Completion, RequestHandle, Token
from lorakit.engine.stopping import UNFINISHED
from lorakit.server import faults
from lorakit.server.served import Served
from lorakit.server.texts import TextStream

_Json = dict[str, Any]


class Answer(ABC):
    """What one call of a route is answered with. Whoever sends it cancels it in the end."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(
        self,
        served: Served,
        model: str,
        handles: Sequence[RequestHandle],
        *,
        include_usage: bool,
        done: Callable[[], None],
    ) -> None:
        """Has nothing yet.

        Args:
            served: makes text of tokens.
            model: as the client called it.
            handles: the engine's requests, one a prompt.
            include_usage: whether a stream ends with its usage.
            done: called when nobody waits for the requests any more; it cancels those that have not ended.
        """
        self._served = served
        self._handles = handles
        self._n = handles[0].request.n
        self._include_usage = include_usage
        self._done = done
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        stops = handles[0].request.stop_strings
        self._texts = [TextStream(served.decode, stops) for _ in range(len(handles) * self._n)]
        self._offsets = [0] * len(self._texts)  # characters of the tokens whose probabilities were told

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._done()

    async def whole(self) -> _Json:
        """All of it, when it is done.

        Raises:
            LorakitError: a request failed.
        """
        await asyncio.gather(*map(_ended, self._handles))
        completions = [completion for handle in self._handles for completion in handle.results(0)]
        choices = []
        for index, completion in enumerate(completions):
            text = self._texts[index].add(completion.token_ids) + self._texts[index].finish()
            choices.append(self._choice(index, text, completion, self._logprobs(index, _tokens(completion))))
        return {**self._head, "object": self.kind, "choices": choices, "usage": self._usage(completions)}

    async def stream(self) -> AsyncIterator[str]:
        """Its events, as they come; an error is the last of them."""
        try:
            for index in range(len(self._texts)):
                for delta in self._opening():
                    yield self._event(index, delta, None)
            news: asyncio.Queue[tuple[int, Token | BaseException | None]] = asyncio.Queue()
            readers = [asyncio.create_task(_read(place, handle, news)) for place, handle in enumerate(self._handles)]
            try:
                async for event in self._events(news):
                    yield event
            finally:
                for reader in readers:
                    reader.cancel()
            yield "data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the headers are gone: an error can only be told in the stream
            yield _data(faults.of(error).body)

    async def _events(self, news: asyncio.Queue[tuple[int, Token | BaseException | None]]) -> AsyncIterator[str]:
        seen = dict.fromkeys(range(len(self._texts)), 0)  # tokens of each choice that goes on
        while seen:
            place, item = await news.get()
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                index = place * self._n + item.sequence
                text, logprobs = self._texts[index].add([item.id]), self._logprobs(index, [item])
                seen[index] += 1
                if text or logprobs is not None:
                    yield self._event(index, self._piece(text, logprobs), None)
            for sequence in range(self._n):
                index = place * self._n + sequence
                completion = self._handles[place].completion(sequence)
                if index in seen and completion is not None and len(completion.token_ids) == seen[index]:
                    del seen[index]
                    yield self._event(index, self._piece(self._texts[index].finish(), None), completion.finish_reason)
        if self._include_usage:
            completions = [completion for handle in self._handles for completion in handle.results(0)]
            yield _data({**self._chunk_head(), "choices": [], "usage": self._usage(completions)})

    def _event(self, index: int, choice: _Json, finish_reason: str | None) -> str:
        chunk = {
            **self._chunk_head(),
            "choices": [{"index": index, **choice, "finish_reason": _reason(finish_reason)}],
            **({"usage": None} if self._include_usage else {}),
        }
        return _data(chunk)

    def _chunk_head(self) -> _Json:
        return {**self._head, "object": self.chunk_kind}

    def _usage(self, completions: Sequence[Completion]) -> _Json:
        prompt = sum(len(handle.request.prompt) for handle in self._handles)
        generated = sum(len(completion.token_ids) for completion in completions)
        # Sequences of one prompt share it.
        cached = sum(handle.results(0)[0].cached_tokens for handle in self._handles)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @abstractmethod
    def _opening(self) -> list[_Json]:
        """What a stream begins with, for each choice."""

    @abstractmethod
    def _piece(self, text: str, logprobs: _Json | None) -> _Json:
        """A piece of a stream."""

    @abstractmethod
    def _choice(self, index: int, text: str, completion: Completion, logprobs: _Json | None) -> _Json:
        """A whole choice."""

    @abstractmethod
    def _logprobs(self, index: int, tokens: Sequence[Token]) -> _Json | None:
        """The logarithmic probabilities of a choice's next tokens, if they were asked for."""


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _opening(self) -> list[_Json]:
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}]

    def _piece(self, text: str, logprobs: _Json | None) -> _Json:
        return {"delta": {"content": text} if text else {}, "logprobs": logprobs}

    def _choice(self, index: int, text: str, completion: Completion, logprobs: _Json | None) -> _Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": _reason(completion.finish_reason),
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> _Json | None:
        if not self._handles[0].request.logprobs:
            return None
        found = []
        for token in tokens:
            top = [self._likely(one.id, one.logprob) for one in token.top]
            found.append({**self._likely(token.id, token.logprob), "top_logprobs": top})
        return {"content": found, "refusal": None}

    def _likely(self, token: int, logprob: float | None) -> _Json:
        text = self._served.token_text(token)
        # Of a part of a character a tokenizer tells no bytes.
        own = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": own}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def _opening(self) -> list[_Json]:
        return []

    def _piece(self, text: str, logprobs: _Json | None) -> _Json:
        return {"text": text, "logprobs": logprobs}

    def _choice(self, index: int, text: str, completion: Completion, logprobs: _Json | None) -> _Json:
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": _reason(completion.finish_reason),
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> _Json | None:
        if not self._handles[0].request.logprobs:
            return None
        texts, offsets = [self._served.token_text(token.id) for token in tokens], []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._handles[0].request.top_logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> _Json:
        """The most likely tokens of a place by their texts, and the one that was drawn, whether it is one or not."""
        top = {self._served.token_text(one.id): _finite(one.logprob) for one in token.top}
        return {self._served.token_text(token.id): _finite(token.logprob)} | top


async def _ended(handle: RequestHandle) -> Completion:
    return await handle


async def _read(
    place: int, handle: RequestHandle, news: asyncio.Queue[tuple[int, Token | BaseException | None]]
) -> None:
    """Hands on a request's tokens, and its end: None, or the error."""
    try:
        async for token in handle:
            news.put_nowait((place, token))
        news.put_nowait((place, None))
    except Exception as error:  # noqa: BLE001 - raised where the events are made
        news.put_nowait((place, error))


def _tokens(completion: Completion) -> list[Token]:
    count = len(completion.token_ids)
    logprobs, tops = completion.logprobs or (None,) * count, completion.top_logprobs or ((),) * count
    places = zip(completion.token_ids, logprobs, tops, strict=True)
    return [Token(token, logprob, top=top) for token, logprob, top in places]


def _finite(logprob: float | None) -> float | None:
    """JSON knows no infinity; OpenAI writes this."""
    return logprob if logprob is None or math.isfinite(logprob) else -9999.0


def _reason(reason: str | None) -> str | None:
    """OpenAI knows no "cancelled"."""
    return "stop" if reason == "cancelled" else reason


def _data(body: _Json) -> str:
    # In ASCII: some readers of lines take more characters than a line feed for their end.
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
