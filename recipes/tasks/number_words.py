"""Spell out a three-digit number in British English words.

Generated data: the answers come from the package num2words (LGPL licence, used as a library). The held-out numbers
are never seen in training (the split is by number).
"""

import random
from collections.abc import Mapping
from typing import Any

from lorakit.errors import MissingDependencyError

from .task import Example, Task


def _spell(number: int) -> str:
    try:
        from num2words import num2words
    except ImportError as error:
        raise MissingDependencyError("Task number_words needs the package num2words: pip install num2words") from error
    return str(num2words(number, lang="en_GB"))


def _draw(rng: random.Random) -> Example:
    number = rng.randint(100, 999)
    return Example(
        key=str(number),
        prompt=f"The number {number} in British English words only:",
        completion=_spell(number),
        extras={},
    )


def check(prediction: str, row: Mapping[str, Any]) -> bool:
    """True when the words are the gold words; case and white space at the ends are free, nothing else is."""
    return prediction.strip().lower() == row["completion"]


TASK = Task(
    name="number_words",
    description="a three-digit number → British English words (generated, num2words)",
    draw=_draw,
    check=check,
    max_new_tokens=16,
)
