"""Examples that a visitor pastes: two columns, what is asked and what is to be answered."""

from __future__ import annotations

import csv
import io

from lorakit.errors import ConfigError

FEWEST, MOST = 4, 200
"""Rows of a table."""

_LONGEST = 2000
_HEADINGS = {("prompt", "answer"), ("prompt", "completion"), ("question", "answer")}


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a pasted table as the recipe reads them.

    Args:
        text: a line a row, its two cells parted by a tab, or by a comma as in CSV; a heading is left out.

    Returns:
        `{"prompt": …, "completion": …}` a row.

    Raises:
        ConfigError: a row has not two cells, or there are too few or too many.
    """
    lines = text.strip().splitlines()
    tabs = sum("\t" in line for line in lines) * 2 >= len(lines) > 0
    try:
        cells = list(csv.reader(io.StringIO(text.strip()), delimiter="\t" if tabs else ",", skipinitialspace=True))
    except csv.Error as error:
        raise ConfigError(f"the table cannot be read: {error}.") from error
    rows = [[cell.strip() for cell in row] for row in cells if any(cell.strip() for cell in row)]
    if rows and tuple(cell.lower() for cell in rows[0]) in _HEADINGS:
        rows = rows[1:]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or not all(row):
            count = len([cell for cell in row if cell])
            raise ConfigError(
                f"row {number} has {count} cells, not two: {' | '.join(row)[:80]!r}. Part "
                'what is asked and what is answered by a tab, or by a comma, and put "quotes" around commas in a text.'
            )
        if max(map(len, row)) > _LONGEST:
            raise ConfigError(f"row {number} is longer than {_LONGEST} characters; shorten it.")
    if not FEWEST <= len(rows) <= MOST:
        raise ConfigError(f"the table has {len(rows)} rows; give {FEWEST} to {MOST}.")
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows]
