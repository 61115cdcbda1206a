"""A sequence under way in a cluster: what it has, and where it is. See `snapshot.Request`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lorakit.engine.handle import RequestHandle
from lorakit.engine.request import Request
from lorakit.scheduler.messages import Known

Counted = Literal["waiting", "running"]


class Flight:
    """One sequence of a request. Only the cluster's loop touches it, but for `over`, `joined` and `cached`.

    Attributes:
        key: tells sequences apart.
        arrival: when it came; moves, evictions and deaths of replicas leave it as it is.
        handle: where its tokens go.
        sequence: which of its request's it is.
        known: its adapter, as replicas know it; None for the base.
        held: the same, as long as it can be read on its account.
        adapter: stands for that adapter's content; -1 for the base.
        rank: of that; 0 for the base.
        generated: its tokens, wherever they came from.
        replica: the replica that has it, or -1.
        ticket: what it goes by there.
        given: when it was given to that one, by `time.monotonic`.
        begun: whether it has got a token there.
        been: the replicas that it was given to, in order; their numbers.
        leaving: whether it was taken back, and its replica has not said so yet.
        target: the replica that keeps a place for it meanwhile, or -1.
        placed: whether a replica ever had it.
        avoid: replicas that could not serve it.
        error: what the last of them said.
        deaths: replicas that died with it, or that it did not reach.
        moves: how often it was moved.
        evictions: how often it was evicted.
        counted: how its tenant's sequences are counted.
        over: whether it has ended.
        joined: when it first was in a batch, by `time.monotonic`; None before.
        cached: tokens of its prompt that the prefix cache of its first replica had.
    """

    def __init__(self, key: int, handle: RequestHandle, sequence: int) -> None:
        """Waits; which content its adapter has is looked at when it is its turn."""
        self.key = key
        self.arrival = handle.submitted
        self.handle = handle
        self.sequence = sequence
        self.known: Known | None = None
        self.held: Known | None = None
        self.adapter = -1
        self.rank = 0
        self.generated: list[int] = []
        self.replica = -1
        self.ticket = -1
        self.given = 0.0
        self.begun = False
        self.been: list[int] = []
        self.leaving = False
        self.target = -1
        self.placed = False
        self.avoid: set[str] = set()
        self.error: BaseException | None = None
        self.deaths = 0
        self.moves = 0
        self.evictions = 0
        self.counted: Counted | None = None
        self.over = False
        self.joined: float | None = None
        self.cached = 0

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.handle.request.tenant

    @property
    def tokens(self) -> int:
        """What a replica that has not seen it computes: prompt and generated tokens."""
        return len(self.handle.request.prompt) + len(self.generated)

    @property
    def cost(self) -> int:
        """What it may take, in tokens."""
        return len(self.handle.request.prompt) + self.handle.request.max_new_tokens

    @property
    def request(self) -> Request:
        """What a replica is asked for: what is left of it. The cluster sees to its deadline."""
        return dataclasses.replace(
            self.handle.request,
            adapter=None if self.known is None else self.known.name,
            n=1,
            deadline=None,
            streamed=tuple(self.generated),
            drawn_as=self.sequence,
        )
