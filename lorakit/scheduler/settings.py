"""What a user types for a simulation, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lorakit.errors import ConfigError
from lorakit.scheduler.costs import SECOND, Costs, read_costs
from lorakit.scheduler.policy import Policy

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Policy)}
_OPTIONAL = {"consolidate_every": float, "rank_budget": int}
"""Fields that may be none."""


def make_policy(items: Sequence[str], *, most: int) -> Policy:
    """A policy from its defaults and FIELD=VALUE.

    Args:
        items: such as "linger=20", "affinity=true", "consolidate_every=none".
        most: GPUs there are.

    Raises:
        ConfigError: a field is unknown, or a value is none of its kind.
    """
    changes: dict[str, Any] = {"most": most}
    for item in items:
        name, _, value = item.partition("=")
        if name not in _DEFAULTS:
            raise ConfigError(f"the policy has no field {name!r}; it has {', '.join(_DEFAULTS)}.")
        changes[name] = _value(name, value)
    return Policy(**changes)


def make_costs(name: str, start: float | None) -> Costs:
    """Costs by name or file, with another time for a GPU to start if one is given, in seconds."""
    costs = read_costs(name)
    return costs if start is None else dataclasses.replace(costs, start=round(start * SECOND))


def _value(name: str, value: str) -> Any:
    kind = _OPTIONAL.get(name, type(_DEFAULTS[name]))
    if name in _OPTIONAL and value.lower() == "none":
        return None
    if kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        if kind is not bool:
            return kind(value)
    except ValueError:
        pass
    words = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    none = " or none" if name in _OPTIONAL else ""
    raise ConfigError(f"the policy's {name} is {value!r}; give {words}{none}.")
