"""The standing batches of a model, one for each mode that its adapters need."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

from lorakit.adapters.layout import Layout
from lorakit.runtime.adapted_base import AdaptedBase
from lorakit.runtime.pool import Slot, plain_tensors
from lorakit.runtime.roster import Roster
from lorakit.runtime.standing import Mode, Standing, StandingRouting, can_stand

_FEWEST_SLOTS = 64
"""Slots that a batch's table has room for at least, as adapters may come."""


class Standings:
    """Standing batches, made when they are first asked for, and anew when modules come that no adapter has touched."""

    def __init__(self, base: AdaptedBase, roster: Roster, output: str | None) -> None:
        """Stands for nothing yet.

        Args:
            base: the base.
            roster: the adapters that are served.
            output: the path of the base's output layer, if it has one.
        """
        self._base = base
        self._roster = roster
        self._output = output
        self._found: dict[Mode, Standing | None] = {}
        self._layouts: dict[str, bool] = {}
        self._paths: set[str] = set()

    @property
    def version(self) -> tuple[int, int, int]:
        """What graphs of standing batches are right for: modules, siblings and tables as they are now."""
        return len(self._paths), len(self._base.siblings), self._base.table.version

    def clear(self) -> None:
        """Forgets all of them."""
        self._found, self._layouts, self._paths = {}, {}, set()

    def of(self, slots: Collection[Slot], *, tokens: int, segments: int) -> Standing | None:
        """The standing batch that serves these slots; None where none can.

        Args:
            slots: one at least.
            tokens: the most that a forward has.
            segments: the most slots that its tokens have.
        """
        if not all(slot.layout.key in self._layouts for slot in slots):
            self._stand({slot.layout for slot in slots} | {source.layout for source in self._roster.sources()})
        if not all(self._layouts[slot.layout.key] for slot in slots):
            return None
        return self._of(Mode.of((slot.dtype, slot.layout) for slot in slots), tokens, segments)

    def of_each(self, dtype: torch.dtype | None, *, tokens: int, segments: int) -> list[Standing]:
        """Standing batches for any one of the adapters that are served now; the last is for all together, too.

        Args:
            dtype: of A and B on the device; None: as each has them.
            tokens: as in `of`.
            segments: as in `of`.
        """
        sources = self._roster.sources()
        self._stand({source.layout for source in sources})
        kinds = {(dtype or source.dtype, source.layout) for source in sources if can_stand(source.layout)}
        modes = {Mode.of([kind]) for kind in kinds} | ({Mode.of(kinds)} if kinds else set())
        found = [self._of(mode, tokens, segments) for mode in sorted(modes, key=_breadth)]
        return [standing for standing in found if standing is not None]

    @contextmanager
    def asked(self, standing: Standing) -> Iterator[None]:
        """Modules ask a standing batch for their adapters' shares, in what runs inside."""
        with ExitStack() as stack:
            for routing in standing.routings:
                stack.enter_context(self._base.joined(routing))
            yield
            for routing in standing.routings:
                routing.served = True

    def _stand(self, layouts: Iterable[Layout]) -> None:
        """Hooks all modules of these layouts; standing batches are made anew if some are new, and kept if none is.

        Graphs know a standing batch by the addresses of its tensors.
        """
        before = len(self._paths)
        for layout in layouts:
            self._layouts[layout.key] = can_stand(layout)
            if self._layouts[layout.key]:
                self._base.adapt_modules(layout.modules, shared=True)
                self._paths |= {module.path for module in layout.modules}
        if len(self._paths) > before:
            self._found = {}

    def _of(self, mode: Mode, tokens: int, segments: int) -> Standing | None:
        if mode not in self._found:
            with plain_tensors():
                self._found[mode] = self._new(mode, tokens, segments)
        return self._found[mode]

    def _new(self, mode: Mode, tokens: int, segments: int) -> Standing | None:
        base = self._base
        if not all(base.modules[path].device == base.device and base.modules[path].aligned for path in self._paths):
            return None
        # A table that grew would be another one, and graphs that were captured of no use.
        base.table.reserve(max(_FEWEST_SLOTS, len(self._roster.names)), mode.dtypes, sorted(self._paths))
        make = partial(StandingRouting, mode=mode, tokens=tokens, segments=segments, device=base.device)
        heads = self._paths & {self._output}
        body = make(sorted(self._paths - heads), base.table, base.finder)
        return Standing(mode, body, make(sorted(heads), base.table, base.finder) if heads else None)


def _breadth(mode: Mode) -> tuple[int, int, str]:
    """Larger for a mode of more adapters."""
    return len(mode.dtypes), mode.max_rank, str(mode)
