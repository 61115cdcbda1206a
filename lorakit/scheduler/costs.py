"""What a replica's work takes: a forward, a load, a start. In whole picoseconds, so that sums are exact in any order.

    forward = step + row · rows + context · tokens of their contexts
              + lora + rank · ranks of the batch's adapters, each adapter once      if any row has an adapter
              + prompts + prompt · tokens of the prompts that begin                 if any prompt begins

The numbers are fitted to saved measurements (`fitting.py`); `measured/` has the fits, each with what it is from.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ConfigError

SECOND = 10**12
"""Picoseconds of a second."""

MEASURED = Path(__file__).parent / "measured"
"""The fits that come with lorakit, a file each."""


@dataclass(frozen=True)
class Costs:
    """The costs of one base on one kind of GPU, in picoseconds.

    Attributes:
        step: a forward, whatever is in it: the base's weights are read.
        row: a row that is decoded.
        context: a token that a decoded row attends to.
        lora: adapters in the batch, however many.
        rank: a rank of an adapter in the batch; an adapter of rank 16 costs 16 times so much.
        prompts: prompts in the forward, however many.
        prompt: a token of these.
        load: an adapter that comes from host memory to the device, beside what runs.
        start: a GPU, from being asked for until it serves.
        prompt_budget: tokens of prompts that one forward takes; a longer prompt takes one alone.
    """

    step: int
    row: int
    context: int
    lora: int
    rank: int
    prompts: int
    prompt: int
    load: int
    start: int = 30 * SECOND
    prompt_budget: int = 8192

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("step", "prompt_budget") else 0
            if type(value) is not int or value < least:
                raise ConfigError(f"the cost {field.name} is {value!r}; give a whole number of at least {least}.")

    def times(self, factor: float) -> Costs:
        """Forwards that take so many times as long; loads and starts as they are."""
        kept = ("load", "start", "prompt_budget")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in kept}
        longer = {name: round(value * factor) for name, value in values.items()}
        return dataclasses.replace(self, **{**longer, "step": max(1, longer["step"])})

    def forward(self, rows: int, context: int, ranks: int, prompt: int = 0) -> int:
        """A forward of so many decoded rows, beside prompts of so many tokens (0: none)."""
        found = self.step + self.row * rows + self.context * context
        if ranks:
            found += self.lora + self.rank * ranks
        if prompt:
            found += self.prompts + self.prompt * prompt
        return found


def read_costs(name: str) -> Costs:
    """Reads costs: a fit that comes with lorakit, by its name, or a file of the same form.

    Raises:
        ConfigError: there is no such fit, or the file is none.
    """
    path = MEASURED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    known = ", ".join(sorted(one.stem for one in MEASURED.glob("*.json")))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        costs = Costs(**found["picoseconds"], **found.get("limits", {}))
    except OSError as error:
        raise ConfigError(f"there are no costs {name!r}: there are {known}, or give a file's path.") from error
    except (ValueError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} does not hold costs: {error}. Take a file of {MEASURED} as an example.") from error
    return costs
