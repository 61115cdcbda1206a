"""How a cluster is set up."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorakit.engine.checks import number, whole
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import ConfigError


@dataclass(frozen=True)
class ClusterConfig:
    """How a cluster is set up.

    Attributes:
        max_waiting: sequences that may wait; more are refused with `EngineBusyError`.
        tenants: the policies of tenants by name.
        default_tenant: the policy of all others.
        beat: seconds between two signs of life that a replica is sent.
        silence: seconds without news after which a replica is given up.
        stuck: seconds in which a replica does no forward, though it has sequences, after which it is given up.
        tries: replicas that may die with a sequence, or fail to serve it, before it fails.
        start_timeout: seconds for the first replica to come.
    """

    max_waiting: int = 4096
    tenants: dict[str, TenantPolicy] = field(default_factory=dict)
    default_tenant: TenantPolicy = field(default_factory=TenantPolicy)
    beat: float = 1.0
    silence: float = 15.0
    stuck: float = 120.0
    tries: int = 3
    start_timeout: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("beat", "silence", "stuck", "start_timeout"):
            number(
                ConfigError, f"the cluster's {name}", getattr(self, name), lambda value: value > 0, "seconds above 0"
            )
        for name in ("max_waiting", "tries"):
            whole(ConfigError, f"the cluster's {name}", getattr(self, name), 1)
