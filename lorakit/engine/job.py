"""One sequence that the engine generates: what a batch needs to know of it, and when it ends.

A request of n sequences has n jobs. Only the engine's thread touches one. Knows token ids and a slot; no batch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from lorakit.engine import sampling
from lorakit.engine.handle import FinishReason, Likely, RequestHandle
from lorakit.engine.stopping import Decode, StopStrings
from lorakit.errors import EngineError
from lorakit.runtime.pool import Slot
from lorakit.runtime.prompts import last_occurrence
from lorakit.runtime.roster import Adapter

_SALT = struct.Struct("<4i")


class Job:
    """One sequence.

    Attributes:
        id: names it; no other job has the same.
        handle: where its tokens go.
        sequence: which of its request's it is.
        request: what was asked for.
        slot: the slot that acts on its tokens; None for the base.
        held: the slot that is held for it, which may not act at all.
        bound: whether `bind` has been called.
        start: the token from which on its adapter acts.
        base_salt: four 32-bit numbers that stand for the request's salt of the prefix cache; None for none.
        salt: the same of the adapter's content and `start` too; `base_salt` for the base.
        generated: its tokens, those that another engine has generated among them.
        cached: tokens of its prompt that the prefix cache had.
        joined: when it first was in the batch, by `time.monotonic`; None before.
        over: whether it has ended, for whatever reason.
        shared: whether other processes have the same job.
    """

    def __init__(self, handle: RequestHandle, sequence: int, decode: Decode | None, *, shared: bool = False) -> None:
        """Begins.

        Args:
            handle: of its request.
            sequence: which of its sequences it is.
            decode: makes text of tokens, for stop strings.
            shared: other processes have the same job, and know nothing of its caller or of text. It leaves the batch by
                its tokens and their number alone, or when all of them are told.
        """
        self.shared = shared
        self.handle = handle
        self.sequence = sequence
        self.request = handle.request
        self.id = handle.id if self.request.n == 1 else f"{handle.id}/{sequence}"
        self.slot: Slot | None = None
        self.held: Slot | None = None
        self.bound = False
        self.start = 0
        salt = self.request.cache_salt
        self.base_salt = _salt(f"/{salt}") if salt else None
        self.salt = self.base_salt
        self.generated = list(self.request.streamed)
        self.cached = 0
        self.joined: float | None = None
        self.over = False
        strings = self.request.stop_strings
        assert decode is not None or not strings
        self._stopping = StopStrings(strings, decode) if decode is not None and strings else None
        self._seed = f"{self.request.seed}/{self.request.drawn_as + sequence}"

    @property
    def adapter(self) -> str | None:
        """Its adapter's name."""
        return self.request.adapter

    @property
    def begun(self) -> bool:
        """Whether it has got a token here."""
        return len(self.generated) > len(self.request.streamed)

    @property
    def cost(self) -> int:
        """The tokens that it may take at most."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def unused(self) -> int:
        """Those of them that it did not take."""
        return self.request.max_new_tokens - len(self.generated)

    @property
    def deadline(self) -> float | None:
        """When it fails, by `time.monotonic`."""
        seconds = self.request.deadline
        return None if seconds is None else self.handle.submitted + seconds

    def bind(self, adapter: Adapter | None, slot: Slot | None) -> None:
        """Gives it its adapter's slot, or the base (None), for good."""
        assert not self.bound
        self.bound = True
        if adapter is None or slot is None:
            return
        if adapter.invocation is not None:
            start = last_occurrence(adapter.invocation, self.request.prompt)
            if start is None:
                return  # as in PEFT, an adapter that is not invoked does not act
            self.start = start
        self.slot = slot
        # With `start`: an invocation may end in the block after the one in which it begins, and which of several is the
        # last, the tokens of a block do not tell.
        self.salt = _salt(f"{adapter.key}/{self.start}/{self.request.cache_salt}")

    def bind_like(self, slot: Slot | None, start: int, salt: tuple[int, ...] | None) -> None:
        """Binds it as the same job is bound in another process, which may have its `slot`, `start` and `salt`."""
        assert not self.bound
        self.bound, self.slot, self.start, self.salt = True, slot, start, salt

    def slot_at(self, position: int) -> Slot | None:
        """The slot that acts on the token at a position."""
        return self.slot if position >= self.start else None

    def settings(self, place: int) -> sampling.Settings:
        """How the token at a place after the prompt is drawn."""
        request = self.request
        if not request.temperature:
            return sampling.GREEDY
        return sampling.Settings(request.temperature, request.top_k, request.top_p, sampling.draw(self._seed, place))

    def take(self, token: int, logprob: float | None, likely: Sequence[Likely] = ()) -> bool:
        """Takes a generated token, and tells whether the sequence ends with it, or has ended already.

        Args:
            token: the token.
            logprob: its logarithmic probability.
            likely: the most likely tokens of its place, first those that are most.
        """
        # Its request may have failed with another sequence.
        self.over = self.over or self.handle.done
        if self.over and not self.shared:
            return True
        self.generated.append(token)
        top = tuple(likely[: self.request.top_logprobs])
        self.handle.add(self.sequence, token, logprob if self.request.logprobs else None, top)
        if token in self.request.stop_token_ids:
            self._finish("stop", token)
            return True
        self._look_for_text()
        full = len(self.generated) >= self.request.max_new_tokens
        if full and not self.over:
            self._finish("length", None)
        return full or (self.over and not self.shared)

    def _look_for_text(self) -> None:
        """Ends where a stop string is complete."""
        if self._stopping is None or self.over:
            return
        try:
            text = self._stopping.found(self.generated)
        except EngineError as error:
            self.fail(error)
            return
        if text is not None:
            self._finish("stop", text)

    def cancel(self) -> None:
        """Ends where it stands."""
        self._finish("cancelled", None)

    def fail(self, error: BaseException) -> None:
        """Ends by an error, and its request with it: what else it draws ends with the next token."""
        self.over = True
        self.handle.fail(error)

    def _finish(self, reason: FinishReason, stop: int | str | None) -> None:
        self.over = True
        self.handle.finish(self.sequence, reason, stop, cached=self.cached, joined=self.joined)


def _salt(content: str) -> tuple[int, ...]:
    encoded = content.encode(errors="surrogatepass")  # a client's text may hold what UTF-8 cannot
    return _SALT.unpack(hashlib.blake2b(encoded, digest_size=_SALT.size).digest())
