"""A cluster at one moment, real or simulated: what is drawn over time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """The cluster at one moment.

    Attributes:
        seconds: from the trace's beginning.
        gpus: that are paid for: serving, starting or draining.
        waiting: requests that wait for a place.
        working_sets: GPU → requests of its working set. Simulated GPUs that start have none; a real cluster has no
            numbers for them yet.
    """

    seconds: float
    gpus: int
    waiting: int
    working_sets: dict[int, int]
