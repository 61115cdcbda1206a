"""The tenants' tasks: one file each, each with a `TASK` and a `check`."""

from lorakit.errors import ConfigError

from . import contact_json, number_words, text_to_sql
from .task import Example, Split, Task, split_of

__all__ = ["Example", "Split", "Task", "get_task", "split_of", "task_names"]

_TASKS = {task.name: task for task in (contact_json.TASK, text_to_sql.TASK, number_words.TASK)}


def task_names() -> list[str]:
    """Names of all tasks, in the order in which quickstart shows them."""
    return list(_TASKS)


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ConfigError: No task has this name; the message lists those there are.
    """
    if name not in _TASKS:
        raise ConfigError(f"task {name!r} is unknown: use one of {', '.join(_TASKS)}, or give train_file instead.")
    return _TASKS[name]
