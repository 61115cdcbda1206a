"""Rows: what a batch is divided into at some of its modules, and which adapter each part has.

Mostly a row is a row of the call, with any number of tokens. Where an adapter begins to act in the middle of one, rows
are single tokens; in a tower they are images or sounds. Knows slots and paths; no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lorakit.runtime.pool import Slot


class Rows(NamedTuple):
    """Rows, in the order in which modules are given them.

    Attributes:
        slots: the slot of each row, None for the base.
        tokens: a module is given a multiple of so many tokens for a row.
        exact: and just so many.
        paths: the modules that are given these rows; None for all.
    """

    slots: tuple[Slot | None, ...]
    tokens: int = 1
    exact: bool = False
    paths: frozenset[str] | None = None

    @property
    def used(self) -> list[Slot]:
        """The slots of some row, each once."""
        return [slot for slot in dict.fromkeys(self.slots) if slot is not None]

    @property
    def touched(self) -> list[str]:
        """The modules among `paths` that some row's adapter touches, each once."""
        found = dict.fromkeys(module.path for slot in self.used for module in slot.layout.modules)
        return [path for path in found if self.paths is None or path in self.paths]

    @property
    def shared(self) -> bool:
        """Whether it matters which part of an input is whose: not where one adapter acts on all of it."""
        return len(self.slots) > 1 or self.exact


def together(slots: Sequence[Slot | None]) -> tuple[Slot | None, ...]:
    """One row where all have the same adapter: whatever the model does with rows, it is right."""
    first = slots[0]
    return (first,) if first is not None and all(slot is first for slot in slots) else tuple(slots)
