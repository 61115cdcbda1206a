"""What a tenant's task is: prompts with one right answer each, and the rule that says whether an answer is right."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset

from lorakit.errors import ConfigError

Split = Literal["train", "held_out"]

# One input in four is held out. The share only has to leave both sides large enough to draw from.
_HELD_OUT_ONE_IN = 4
# So many draws in a row without a new one mean that the task has (nearly) no more.
_MAX_MISSES = 1000


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Args:
        key: What makes two inputs the same input. The split is decided by this key alone.
        prompt: The user's instruction, without a chat template.
        completion: The right answer.
        extras: Further columns that the task's checker reads.
    """

    key: str
    prompt: str
    completion: str
    extras: Mapping[str, Any]


def split_of(task_name: str, key: str) -> Split:
    """The split to which an input belongs, whatever the seed: train and held-out inputs cannot overlap.

    It is a function of the key's SHA-256, hence the same in every process (`hash` of a string is not).
    """
    digest = hashlib.sha256(f"{task_name}/{key}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0 else "train"


@dataclass(frozen=True)
class Task:
    """A tenant's task.

    Args:
        name: Short name, usable as an adapter's name.
        description: One line for people: what is asked, and where the data comes from.
        draw: Draws one example from a random generator.
        check: `check(prediction, row)` is true when the model's text answers the row exactly.
        max_new_tokens: Enough tokens for the longest right answer, in SmolLM2's tokens.
    """

    name: str
    description: str
    draw: Callable[[random.Random], Example]
    check: Callable[[str, Mapping[str, Any]], bool]
    max_new_tokens: int

    def dataset(self, split: Split, size: int, seed: int) -> Dataset:
        """Generates rows of one split.

        The same arguments give the same rows in every process. Rows of one call are distinct; rows of different
        splits are disjoint for all seeds, because `split_of` assigns each input to one split for good.

        Args:
            split: `"train"` or `"held_out"`.
            size: Number of rows, at least 1.
            seed: Seed of the generator.

        Returns:
            `Dataset` with the columns `key`, `prompt`, `completion` and what the checker reads; all but numbers are
            strings.

        Raises:
            ConfigError: Unknown split, size below 1, or a size that the task has not enough distinct inputs for.
        """
        if split not in ("train", "held_out"):
            raise ConfigError(f"split {split!r} is unknown: use 'train' or 'held_out'.")
        if size < 1:
            raise ConfigError(f"size is {size}: a dataset needs at least 1 row.")
        # A string seed is hashed with SHA-512 by `random`, so it is stable across processes.
        rng = random.Random(f"{self.name}/{split}/{seed}")
        rows: dict[str, dict[str, Any]] = {}
        misses = 0
        while misses < _MAX_MISSES:
            misses += 1
            example = self.draw(rng)
            if split_of(self.name, example.key) == split and example.key not in rows:
                misses = 0
                rows[example.key] = {
                    "key": example.key,
                    "prompt": example.prompt,
                    "completion": example.completion,
                    **example.extras,
                }
                if len(rows) == size:
                    return Dataset.from_list(list(rows.values()))
        raise ConfigError(
            f"task {self.name!r} has only about {len(rows)} distinct {split} inputs: ask for a size below {size}."
        )
