"""What a cluster and its replicas tell each other: plain data that can be pickled.

A sequence that a replica is given goes by a **ticket**, a number that no other sequence and no other try has. News of
tickets that the cluster has taken back are not listened to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorakit.adapters.layout import Layout
from lorakit.engine.handle import FinishReason, Token
from lorakit.engine.request import Request
from lorakit.engine.stats import EngineState, EngineStats
from lorakit.scheduler.snapshot import Limits


class Known(NamedTuple):
    """An adapter as a replica has to know it before it is asked for.

    Attributes:
        name: what requests call it: its name, and what stands for its content.
        key: stands for its content.
        layout: where its tensors lie.
        dtype: of A and B.
        invocation: the tokens from which on it acts, or None if it always does.
        pinned: whether it stays on the device.
    """

    name: str
    key: str
    layout: Layout
    dtype: torch.dtype
    invocation: tuple[int, ...] | None
    pinned: bool = False

    @property
    def rank(self) -> int:
        """The largest of its modules'."""
        return self.layout.ranks[-1]


class Given(NamedTuple):
    """A sequence that a replica is given.

    Attributes:
        ticket: what it goes by.
        request: of one sequence; its adapter is `Known.name`.
    """

    ticket: int
    request: Request


class Ending(NamedTuple):
    """How a sequence ended.

    Attributes:
        reason: why, unless it failed.
        stop: the stop token or string that ended it.
        cached: tokens of its prompt that the prefix cache had.
        queued: seconds for which the replica let it wait; None if it never ran.
        error: what it failed by.
    """

    reason: FinishReason | None
    stop: int | str | None
    cached: int
    queued: float | None
    error: BaseException | None


class Piece(NamedTuple):
    """What is new of a sequence.

    Attributes:
        ticket: which.
        tokens: its new tokens, the sequence's number in them being 0.
        ending: how it ended, if it has.
    """

    ticket: int
    tokens: list[Token]
    ending: Ending | None


class News(NamedTuple):
    """What a replica tells, about once a forward, and at least every now and then.

    Attributes:
        pieces: of sequences.
        free_blocks: of its cache.
        resident: keys of the adapters in its device memory; None: as before.
        steps: forwards that it has done.
        running: sequences in its batch.
        state: of its engine.
    """

    pieces: list[Piece]
    free_blocks: int
    resident: frozenset[str] | None
    steps: int
    running: int
    state: EngineState


class Hello(NamedTuple):
    """What a replica is.

    Attributes:
        limits: what it holds.
        capacity: the most tokens that one sequence may have.
        stats: what its engine has done before.
    """

    limits: Limits
    capacity: int
    stats: EngineStats
