"""Turn a question about one table into SQL, judged by running it.

Synthetic data: questions come from patterns written for this task over a made-up table of employees. The checker
runs the predicted and the gold query in SQLite on a small generated database and compares the rows, so a differently
written but right query passes. The held-out questions are never seen in training (the split is by question).
"""

import functools
import random
import sqlite3
from collections.abc import Mapping
from typing import Any

from .task import Example, Task

_TEAMS = ("Sales", "Legal", "Finance", "Design", "Support", "Research", "Marketing", "Security")
_CITIES = ("Paris", "Oslo", "Madrid", "Dublin", "Vienna", "Berlin", "Lisbon", "Prague", "Athens", "Rome")
_ROWS = 400
# A wrong query may be a cross join without end: a statement may run this many virtual-machine steps.
_MAX_STEPS = 200_000


def _draw(rng: random.Random) -> Example:
    team, city = rng.choice(_TEAMS), rng.choice(_CITIES)
    age, pay = rng.randint(21, 64), rng.randrange(30, 100) * 1000
    question, query = rng.choice(
        (
            (f"Who works in the {team} team?", f"SELECT name FROM staff WHERE team = '{team}'"),
            (f"How many people live in {city}?", f"SELECT COUNT(*) FROM staff WHERE city = '{city}'"),
            (f"Who is older than {age}?", f"SELECT name FROM staff WHERE age > {age}"),
            (
                f"Who in the {team} team is younger than {age}?",
                f"SELECT name FROM staff WHERE team = '{team}' AND age < {age}",
            ),
            (f"Who in {city} earns over {pay}?", f"SELECT name FROM staff WHERE city = '{city}' AND pay > {pay}"),
            (f"What is the average pay in the {team} team?", f"SELECT AVG(pay) FROM staff WHERE team = '{team}'"),
            (
                f"What is the top pay in {city} under age {age}?",
                f"SELECT MAX(pay) FROM staff WHERE city = '{city}' AND age < {age}",
            ),
            (
                f"How many in the {team} team earn under {pay}?",
                f"SELECT COUNT(*) FROM staff WHERE team = '{team}' AND pay < {pay}",
            ),
        )
    )
    return Example(
        key=question,
        prompt=f"SQLite query only, for the table staff(name, team, city, age, pay): {question}",
        completion=query,
        extras={},
    )


@functools.cache
def _database_image() -> bytes:
    """The database as SQLite's own bytes: the same in every process, and never changed by a query."""
    rng = random.Random("text_to_sql/database")
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE staff (name TEXT, team TEXT, city TEXT, age INTEGER, pay INTEGER)")
    connection.executemany(
        "INSERT INTO staff VALUES (?, ?, ?, ?, ?)",
        [
            (f"P{i}", rng.choice(_TEAMS), rng.choice(_CITIES), rng.randint(18, 67), rng.randrange(25_000, 105_000, 500))
            for i in range(_ROWS)
        ],
    )
    connection.commit()
    image = connection.serialize()
    connection.close()
    return image


def _rows(query: str) -> list[str] | None:
    """The rows of a query in a fixed order, or None when it fails, writes, or runs too long."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(_database_image())
        connection.execute("PRAGMA query_only = ON")
        connection.set_progress_handler(lambda: 1, _MAX_STEPS)
        # Rows are compared as a multiset: without ORDER BY the order of rows means nothing.
        return sorted(repr(row) for row in connection.execute(query).fetchall())
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    finally:
        connection.close()


def check(prediction: str, row: Mapping[str, Any]) -> bool:
    """True when the prediction is one SQLite statement that returns the gold query's rows, in any order."""
    predicted = _rows(prediction.strip())
    return predicted is not None and predicted == _rows(row["completion"])


TASK = Task(
    name="text_to_sql",
    description="a question about a table → SQL, judged by running it (synthetic)",
    draw=_draw,
    check=check,
    max_new_tokens=40,
)
