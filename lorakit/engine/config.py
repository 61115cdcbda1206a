"""How an engine is set up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.engine.fairness import QUANTUM
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; where None stands, the device decides.

    Attributes:
        max_requests: sequences that run in one batch. None: 256 on a GPU, 32 elsewhere.
        max_batch_tokens: tokens of one forward, prompts in pieces among them. None: 8192 on a GPU, 512 elsewhere.
        cache_memory: bytes of the paged key-value cache. None: what a GPU has free; 1 GiB elsewhere.
        page_size: tokens of a block; prompts share whole blocks. None: 256 on a GPU, as FlashAttention wants it; 32
            elsewhere.
        prefix_cache: whether requests of the same adapter content share the blocks of a common beginning.
        max_waiting: sequences that may wait; more are refused with `EngineBusyError`.
        tenants: the policies of tenants by name.
        default_tenant: the policy of all others.
        quantum: tokens of a tenant's turn, see `fairness`.
        patience: seconds for which others may pass a request whose adapter finds no room among running ones.
        readers: adapters that are read from the disk at the same time.
        restarts: how often the loop is started anew after a crash, before the engine stays down.
        stop_timeout: seconds to wait for the step under way when the engine is closed.
    """

    max_requests: int | None = None
    max_batch_tokens: int | None = None
    cache_memory: int | None = None
    page_size: int | None = None
    prefix_cache: bool = True
    max_waiting: int = 4096
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)
    default_tenant: TenantPolicy = field(default_factory=TenantPolicy)
    quantum: int = QUANTUM
    patience: float = 1.0
    readers: int = 2
    restarts: int = 3
    stop_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_batch_tokens", "cache_memory", "page_size"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or None")
        for name in ("max_waiting", "quantum", "readers"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("patience", "restarts"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("stop_timeout", self.stop_timeout > 0, "more than 0 seconds")
        self._check("page_size", self.page_size is None or self.page_size >= 4, "at least 4")

    def _check(self, name: str, right: bool, limits: str) -> None:
        if not right:
            raise ConfigError(f"the engine's {name} is {getattr(self, name)!r}; give {limits}.")
