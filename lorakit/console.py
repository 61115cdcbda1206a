"""What a person sees in a terminal: one console, tables, progress bars. Knows rich; knows no model and no bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Step = Callable[..., None]


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error."""
    return Console(stderr=stderr, highlight=False, emoji=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table; columns whose values are numbers or sizes are aligned right. "[b]" in a value is no markup."""
    result = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(str(row[index])[:1].isdigit() for row in rows)
        result.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(value)) for value in row))
    return result


@contextmanager
def bar(title: str, total: int | None) -> Iterator[Step]:
    """A progress bar on standard error, where that is a terminal.

    What it gives is called once a step; its arguments are ignored.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = make_console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda *_: progress.advance(task)
