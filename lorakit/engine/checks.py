"""Settings that users give: checked, and made plain Python's, as numpy's numbers are right too."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

from lorakit.errors import LorakitError

_MOST_SHOWN = 80


def whole(error: type[LorakitError], name: str, value: object, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`.

    Args:
        error: what is raised for anything else.
        name: what it is.
        value: as it was given.
        least: the smallest that is right.
        most: the largest, or None for any.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        found = int(value)
        if found >= least and (most is None or found <= most):
            return found
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    raise error(f"{name} is {shown(value)}; give a whole number, {limits}.")


def number(error: type[LorakitError], name: str, value: object, fits: Callable[[float], bool], limits: str) -> float:
    """A finite number within limits.

    Args:
        error: what is raised for anything else.
        name: what it is.
        value: as it was given.
        fits: whether it lies within the limits.
        limits: these in words.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if math.isfinite(found) and fits(found):
            return found
    raise error(f"{name} is {shown(value)}; give a number, {limits}.")


def yes_or_no(error: type[LorakitError], name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    if isinstance(value, bool):
        return value
    raise error(f"{name} is {shown(value)}; give True or False.")


def shown(value: object) -> str:
    """A value for a message: its beginning, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
