"""Activation: adapters that begin to act in the middle of their rows, and what each forward is given of them.

A forward in which some token lies before its row's start is served token by token; every other one, and so all of
decoding, row by row, at no cost. Columns number the tokens of a row from its first, padding and cache included.
Knows slots and what transformers gives a model; no name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.runtime.pool import Slot
from lorakit.runtime.prompts import seen
from lorakit.runtime.rows import Rows, together


@dataclass(frozen=True)
class Activation:
    """From which column on each row's adapter acts.

    Attributes:
        slots: the slot of each row, None for the base.
        starts: the first column at which it acts.
    """

    slots: tuple[Slot | None, ...]
    starts: tuple[int, ...]

    @property
    def last(self) -> int:
        """The column from which on all of them act."""
        return max(self.starts)

    def rows(self, columns: Sequence[int], copies: int = 1) -> Rows:
        """What a module is given that sees these columns of every row.

        Args:
            columns: in their order.
            copies: how often each row is there (its beams), one beside the other.
        """
        if min(columns, default=self.last) >= self.last:
            return Rows(together(self.slots))
        return self.tokens(columns, copies)

    def tokens(self, columns: Sequence[int], copies: int = 1) -> Rows:
        """The same, a row a token."""
        pairs = zip(self.slots, self.starts, strict=True)
        return Rows(
            tuple(
                slot if column >= start else None for slot, start in pairs for _ in range(copies) for column in columns
            ),
            exact=True,
        )


@dataclass(frozen=True)
class Pass:
    """One forward of the base: which columns it computes, and of which it gives logits.

    Attributes:
        columns: of the tokens that it is given.
        kept: of those that reach the output's module.
        copies: how often each of the call's rows is in it.
    """

    columns: range
    kept: Sequence[int]
    copies: int

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], first: int, rows: int) -> Pass:
        """Reads a forward's arguments.

        Args:
            args: positional; ids come first.
            kwargs: by name.
            first: the first token's column.
            rows: of the call.
        """
        given = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
        given = args[0] if given is None else given
        columns = range(first, first + given.shape[1])
        keep = kwargs.get("logits_to_keep", kwargs.get("num_logits_to_keep", 0))
        kept: Sequence[int] = columns
        if isinstance(keep, torch.Tensor):
            kept = [columns[index] for index in keep.tolist()]
        elif keep:
            kept = columns[-keep:]
        return cls(columns, kept, given.shape[0] // rows)


class Generation:
    """Follows a `generate`: before each forward the adapters that act in it are set."""

    def __init__(
        self, base: nn.Module, activation: Activation, serve: Callable[[Pass], AbstractContextManager[None]]
    ) -> None:
        """Follows nothing yet.

        Args:
            base: the model that generates.
            activation: of its rows.
            serve: sets the adapters for a forward.
        """
        self._base = base
        self._activation = activation
        self._serve = serve
        self._served = ExitStack()
        self._hooks = ExitStack()
        self._seen = 0
        self.asleep = False

    @contextmanager
    def follow(self, *, to_the_end: bool) -> Iterator[None]:
        """Until the block ends.

        Args:
            to_the_end: forwards do not come in the order of their columns (a model that is its own assistant).
        """
        self._to_the_end = to_the_end
        with self._served, self._hooks:
            for add, hook in (
                (self._base.register_forward_pre_hook, self._before),
                (self._base.register_forward_hook, self._after),
            ):
                self._hooks.callback(add(hook, with_kwargs=True).remove)
            yield

    @torch.compiler.disable
    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.asleep:
            return
        cached = seen(kwargs)
        forward = Pass.of(args, kwargs, self._seen if cached is None else cached, len(self._activation.slots))
        self._seen = forward.columns.stop
        self._served.close()
        self._served.enter_context(self._serve(forward))

    @torch.compiler.disable
    def _after(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Once a cache holds all that lies before the starts, nothing changes any more and no hook is needed."""
        cached = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
        if self.asleep or self._to_the_end or not cached or self._seen < self._activation.last:
            return
        self._served.close()
        self._served.enter_context(self._serve(Pass(range(self._seen, self._seen + 1), [self._seen], 1)))
        self._hooks.close()
