"""A request of a simulation, and what became of it."""

from __future__ import annotations

from lorakit.scheduler.costs import SECOND
from lorakit.workloads import Asked


class Job:
    """One request under way. Times are picoseconds from the trace's beginning.

    Attributes:
        key: its place in the trace.
        arrival: when it came; moves and evictions leave it as it is.
        adapter: its adapter.
        rank: of that.
        prompt: tokens.
        new_tokens: its budget; what it has streamed counts, wherever that was.
        streamed: tokens streamed before its present replica began it.
        placed: whether a replica ever had it.
        first: when its first token came, or -1.
        moves: how often it was moved.
        evictions: how often it was evicted.
        target: the replica that keeps a place for it while it leaves its own, or -1.
        paused: since when it has been between replicas, or -1.
        moving: picoseconds in which it was moved: from leaving a replica to the next token.
        requeued: picoseconds lost to evictions, likewise.
    """

    __slots__ = (
        "adapter",
        "arrival",
        "evicted",
        "evictions",
        "first",
        "key",
        "moves",
        "moving",
        "new_tokens",
        "paused",
        "placed",
        "prompt",
        "rank",
        "requeued",
        "streamed",
        "target",
    )

    def __init__(self, key: int, asked: Asked, rank: int) -> None:
        self.key = key
        self.arrival = round(asked.arrival * SECOND)
        self.adapter = asked.adapter
        self.rank = rank
        self.prompt = asked.prompt_tokens
        self.new_tokens = asked.new_tokens
        self.streamed = 0
        self.placed = False
        self.first = -1
        self.moves = 0
        self.evictions = 0
        self.evicted = False
        self.target = -1
        self.paused = -1
        self.moving = 0
        self.requeued = 0

    @property
    def tokens(self) -> int:
        """What a replica that has not seen it computes: prompt and streamed tokens."""
        return self.prompt + self.streamed

    @property
    def cost(self) -> int:
        """What it takes in all, in tokens."""
        return self.prompt + self.new_tokens

    def leave(self, now: int, *, evicted: bool) -> None:
        """It was taken off a replica."""
        self.evicted = evicted
        self.evictions += evicted
        self.moves += not evicted
        self.paused = now

    def token(self, now: int) -> None:
        """A replica that began it has its next token."""
        if self.first < 0:
            self.first = now
        if self.paused >= 0:
            if self.evicted:
                self.requeued += now - self.paused
            else:
                self.moving += now - self.paused
            self.paused = -1
