"""Reading fields of untrusted JSON: a value of the right type and range, or a `BankError` that names the field.

Knows JSON values; knows nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lorakit.errors import BankError

LIMIT = 1 << 50
"""No count, offset or size in an index reaches this (a pebibyte), so that sums cannot run away."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """One JSON object whose fields are read by type.

    Args:
        value: what the parser gave.
        where: the object's place, for messages ("adapters.sql").
    """

    __slots__ = ("value", "where")

    def __init__(self, value: object, where: str) -> None:
        if type(value) is not dict:
            raise BankError(f"{where} should be an object, but is {_shown(value)}")
        self.value: dict[str, Any] = value
        self.where = where

    def wrong(self, key: str, expected: str) -> BankError:
        """The error for a field that is not what it should be."""
        found = _shown(self.value[key]) if key in self.value else "missing"
        return BankError(f"{self.where}.{key} should be {expected}, but is {found}")

    def count(self, key: str, least: int = 0, limit: int = LIMIT) -> int:
        """An integer with least <= value < limit."""
        value = self.value.get(key)
        if type(value) is not int or not least <= value < limit:
            raise self.wrong(key, f"an integer of at least {least} and less than {limit}")
        return value

    def number(self, key: str) -> float:
        """A finite number, as float."""
        value: Any = self.value.get(key)
        # The comparison also refuses NaN, and integers too large for a float.
        if type(value) not in (int, float) or not -1e308 < value < 1e308:
            raise self.wrong(key, "a finite number")
        return float(value)

    def text(self, key: str, least: int = 0) -> str:
        """A string of at least `least` characters that can be written as UTF-8."""
        value = self.value.get(key)
        if type(value) is not str or len(value) < least or not (value.isascii() or is_utf8(value)):
            raise self.wrong(key, "a string" if least == 0 else "a non-empty string")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.value.get(key)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def items(self, key: str) -> list[Any]:
        """A list of anything."""
        value = self.value.get(key)
        if type(value) is not list:
            raise self.wrong(key, "a list")
        return value

    def object(self, key: str) -> Fields:
        """An object."""
        return Fields(self.value.get(key), f"{self.where}.{key}")


def is_utf8(text: str) -> bool:
    """Whether text has no lone surrogates (JSON can spell them, no file can hold them)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def compact_json(value: object) -> str:
    """JSON in one line, in the order given."""
    return json.dumps(value, separators=(", ", ": "))


def content_key(value: object) -> str:
    """A short name for a JSON value that is the same wherever the value is the same: 16 hexadecimal digits."""
    return hashlib.sha256(compact_json(value).encode()).hexdigest()[:16]
