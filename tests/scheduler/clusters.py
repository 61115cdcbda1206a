"""What tests of a cluster ask of it, wherever its replicas are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from served import Asked, requests

from lorakit.engine.handle import RequestHandle
from lorakit.scheduler.cluster import Cluster

ADAPTERS = [None, "lora", "dora", "alora", "embeddings"]


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def submitted(cluster: Cluster, asked: Sequence[Asked], **settings: Any) -> list[RequestHandle]:
    """All of them, submitted at once."""
    return [cluster.submit(one.prompt, one.adapter, max_new_tokens=one.tokens, **settings) for one in asked]


def long(count: int, seed: int = 0, tokens: int = 40) -> list[Asked]:
    """Requests of so many tokens each."""
    return [Asked(one.prompt, one.adapter, tokens) for one in requests(count, ADAPTERS, seed=seed, longest=20)]


def spread(cluster: Cluster, handles: Sequence[RequestHandle]) -> None:
    """Moves every other sequence to the youngest replica; in the cluster's loop."""
    youngest = min(cluster._dispatcher._presence.replicas)
    for handle in handles[::2]:
        flight = handle.parts[0]
        full = cluster._dispatcher._presence.replicas[youngest].working_set >= cluster._dispatcher.limits.batch
        if flight.replica not in (-1, youngest) and not flight.leaving and not full:
            cluster._dispatcher._move(flight, youngest)
