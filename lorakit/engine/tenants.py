"""What tenants may take of the engine: weights and caps."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.engine.checks import number, whole
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class TenantPolicy:
    """One tenant's share.

    Attributes:
        weight: its share of the tokens while others wait too, beside theirs.
        max_running: how many of its sequences may run at once, or None for any number.
        max_waiting: how many of its sequences may wait, or None for any number.
    """

    weight: float = 1.0
    max_running: int | None = None
    max_waiting: int | None = None

    def __post_init__(self) -> None:
        weight = number(ConfigError, "a tenant's weight", self.weight, lambda value: value > 0, "above 0")
        object.__setattr__(self, "weight", weight)
        for name in ("max_running", "max_waiting"):
            value = getattr(self, name)
            if value is not None:
                plain = whole(ConfigError, f"a tenant's {name} (None: no limit)", value, 1)
                object.__setattr__(self, name, plain)


class Tenants:
    """The policies, and how many sequences of each tenant run and wait. Callable from any thread."""

    def __init__(self, policies: Mapping[str, TenantPolicy], default: TenantPolicy) -> None:
        """Counts nothing yet.

        Args:
            policies: of tenants by name.
            default: of all others.
        """
        self._policies = dict(policies)
        self._default = default
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Sequences of all tenants that wait."""
        with self._lock:
            return self._waiting.total()

    def policy(self, tenant: str) -> TenantPolicy:
        """A tenant's policy."""
        return self._policies.get(tenant, self._default)

    def change(self, tenant: str, policy: TenantPolicy) -> None:
        """Gives a tenant another policy."""
        self._policies[tenant] = policy

    def may_run(self, tenant: object) -> bool:
        """Whether one more of a tenant's sequences may run."""
        assert isinstance(tenant, str)
        most = self.policy(tenant).max_running
        return most is None or self._running[tenant] < most

    def may_wait(self, tenant: str, count: int) -> bool:
        """Whether so many more of a tenant's sequences may wait."""
        most = self.policy(tenant).max_waiting
        return most is None or self._waiting[tenant] + count <= most

    def count(self, tenant: str, *, waiting: int = 0, running: int = 0) -> None:
        """Counts sequences that come (1) or go (-1)."""
        with self._lock:
            for counter, change in ((self._waiting, waiting), (self._running, running)):
                counter[tenant] += change
                assert counter[tenant] >= 0
                if not counter[tenant]:
                    del counter[tenant]
