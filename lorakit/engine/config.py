"""How an engine is set up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lorakit.engine.checks import number, shown, whole, yes_or_no
from lorakit.engine.fairness import QUANTUM
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import ConfigError

_WHOLE = {"max_waiting": 1, "quantum": 1, "readers": 1, "restarts": 0}
"""Settings that are whole numbers, and their least values."""

_WHOLE_OR_NONE = {"max_requests": 1, "max_batch_tokens": 1, "cache_memory": 1, "page_size": 4}

_SECONDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "patience": (lambda value: value >= 0, "0 or more"),
    # A thread is not waited for longer than that.
    "stop_timeout": (lambda value: 0 < value <= threading.TIMEOUT_MAX, f"0 to {threading.TIMEOUT_MAX:.0f}, but not 0"),
}


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
        cuda_graphs: on a GPU, replay captured forwards. None: with FlashAttention.
        compile_level: transformers' level of compilation, 0 (none) to 3.
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
    cuda_graphs: bool | None = None
    compile_level: int = 0
    max_waiting: int = 4096
    tenants: Mapping[str, TenantPolicy] = field(default_factory=dict)
    default_tenant: TenantPolicy = field(default_factory=TenantPolicy)
    quantum: int = QUANTUM
    patience: float = 1.0
    readers: int = 2
    restarts: int = 3
    stop_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, least in _WHOLE.items():
            self._set(name, whole(ConfigError, _named(name), getattr(self, name), least))
        for name, least in _WHOLE_OR_NONE.items():
            if getattr(self, name) is not None:
                self._set(name, whole(ConfigError, f"{_named(name)} (None: chosen)", getattr(self, name), least))
        for name, (fits, limits) in _SECONDS.items():
            self._set(name, number(ConfigError, _named(name), getattr(self, name), fits, limits))
        if self.cuda_graphs is not None:
            named = f"{_named('cuda_graphs')} (None: chosen)"
            self._set("cuda_graphs", yes_or_no(ConfigError, named, self.cuda_graphs))
        self._set("compile_level", whole(ConfigError, _named("compile_level"), self.compile_level, 0, 3))
        self._set("prefix_cache", yes_or_no(ConfigError, _named("prefix_cache"), self.prefix_cache))
        self._set("tenants", self._policies())
        if not isinstance(self.default_tenant, TenantPolicy):
            raise ConfigError(f"{_named('default_tenant')} is {shown(self.default_tenant)}; give a TenantPolicy.")

    def _policies(self) -> dict[str, TenantPolicy]:
        """A copy: the engine may run for long, and what was given may change."""
        if not isinstance(self.tenants, Mapping):
            raise ConfigError(f"{_named('tenants')} is {shown(self.tenants)}; give a TenantPolicy by each name.")
        for name, policy in self.tenants.items():
            if not isinstance(name, str) or not isinstance(policy, TenantPolicy):
                raise ConfigError(
                    f"{_named('tenants')} has {shown(policy)} for {shown(name)}; give a TenantPolicy by each name."
                )
        return dict(self.tenants)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _named(name: str) -> str:
    return f"the engine's {name}"
