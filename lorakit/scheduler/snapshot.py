"""What a policy sees: requests, and replicas at one moment. Knows no clock, no engine and no GPU.

Whoever schedules (the simulator, a cluster) gives objects with these attributes. `RequestView` and `ReplicaView` are
plain ones, for who has none of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """What a replica holds.

    Attributes:
        batch: requests of a working set at most; Punica's MAX, 32 on an A100.
        blocks: of the key-value cache.
        block_tokens: tokens of a block.
    """

    batch: int = 32
    blocks: int = 4096
    block_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("batch", "blocks", "block_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"a replica's {name} is {value!r}; give a whole number of at least 1.")

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)


class Request(Protocol):
    """A request, waiting or running.

    Attributes:
        key: tells requests apart.
        arrival: when it came; a request that is moved or evicted keeps it.
        tokens: prompt and streamed tokens, all of which a replica computes that has not seen the request.
        adapter: its adapter.
        rank: of that adapter.
    """

    @property
    def key(self) -> int: ...  # noqa: D102
    @property
    def arrival(self) -> float: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def adapter(self) -> int: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102


class Replica(Protocol):
    """One engine, at one moment.

    Attributes:
        id: its number; ties go to the highest.
        working_set: requests that it runs or was given.
        free_blocks: of its cache.
        ranks: the ranks of the adapters in its working set, summed, each adapter once.
        resident: how many adapters lie in its device memory.
        limits: what it holds, where replicas are unlike; None: what all hold.
    """

    @property
    def id(self) -> int: ...  # noqa: D102
    @property
    def limits(self) -> Limits | None: ...  # noqa: D102
    @property
    def working_set(self) -> int: ...  # noqa: D102
    @property
    def free_blocks(self) -> int: ...  # noqa: D102
    @property
    def ranks(self) -> int: ...  # noqa: D102
    @property
    def resident(self) -> int: ...  # noqa: D102

    def uses(self, adapter: int) -> bool:
        """Whether a request of its working set has this adapter."""
        ...

    def requests(self) -> Iterable[Request]:
        """Its working set."""
        ...


@dataclass(frozen=True)
class RequestView:
    """A request as data. See `Request`."""

    key: int
    arrival: float
    tokens: int
    adapter: int = 0
    rank: int = 16


@dataclass(frozen=True)
class ReplicaView:
    """A replica as data. See `Replica`.

    Attributes:
        id: its number.
        held: its working set.
        free_blocks: of its cache.
        residents: adapters in device memory.
        limits: what it holds, where replicas are unlike.
    """

    id: int
    held: tuple[RequestView, ...] = ()
    free_blocks: int = 4096
    residents: frozenset[int] = frozenset()
    limits: Limits | None = None

    @property
    def working_set(self) -> int:
        """Requests that it runs or was given."""
        return len(self.held)

    @property
    def ranks(self) -> int:
        """Ranks of the adapters in the working set, each adapter once."""
        return sum({one.adapter: one.rank for one in self.held}.values())

    @property
    def resident(self) -> int:
        """How many adapters lie in device memory."""
        return len(self.residents)

    def uses(self, adapter: int) -> bool:
        """Whether a request of the working set has this adapter."""
        return any(one.adapter == adapter for one in self.held)

    def requests(self) -> tuple[RequestView, ...]:
        """The working set."""
        return self.held
