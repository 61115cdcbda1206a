"""What a user chooses of a conversion where a checkpoint leaves it open.

Knows arguments; knows no checkpoint, no tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Choices:
    """The choices for one adapter. Making one refuses values that cannot be.

    Attributes:
        svd_energy: the share of ‖ΔW‖²_F, above 0 and at most 1, that a module keeps where its change ΔW has no exact
            low-rank form; None refuses such a change. What has an exact form stays exact.
        task_id: which task of an adapter that has several (Poly), counted from 0.

    Raises:
        ConfigError: naming the choice at fault.
    """

    svd_energy: float | None = None
    task_id: int | None = None

    def __post_init__(self) -> None:
        energy, task = self.svd_energy, self.task_id
        is_number = isinstance(energy, int | float) and not isinstance(energy, bool)
        if energy is not None and not (is_number and 0 < energy <= 1):
            raise ConfigError(f"svd_energy is {energy!r}; give a number above 0, and of at most 1, as 0.999.")
        if task is not None and not (type(task) is int and 0 <= task < 1 << 31):
            raise ConfigError(f"task_id is {task!r}; give a task's number, counted from 0.")


NONE = Choices()
"""Nothing chosen."""


def choices_of(
    names: Collection[str], svd_energy: float | None = None, task_ids: Mapping[str, int] | None = None
) -> dict[str, Choices]:
    """The choices for several adapters.

    Args:
        names: of the adapters.
        svd_energy: for all of them.
        task_ids: name → task, for those that need one.

    Raises:
        ConfigError: a value that cannot be, or a task for an adapter that is not among them.
    """
    task_ids = {} if task_ids is None else task_ids
    if not isinstance(task_ids, Mapping):
        raise ConfigError(f'task_ids is {task_ids!r}; give a mapping from adapters to tasks, as {{"sql": 2}}.')
    for name in task_ids:
        if name not in names:
            raise ConfigError(f"task_ids names {name!r}, which is none of the adapters: {', '.join(names)}.")
    return {name: Choices(svd_energy, task_ids.get(name)) for name in names}
