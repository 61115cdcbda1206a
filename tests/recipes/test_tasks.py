"""The tasks' data and checkers: splits that cannot overlap, gold accepted, near misses refused."""

import json
import subprocess
import sys
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.recipes.tasks import get_task, split_of, task_names

for package in ("faker", "num2words"):
    pytest.importorskip(package)


@pytest.mark.parametrize("name", task_names())
def test_train_and_held_out_never_share_an_input(name: str) -> None:
    task = get_task(name)
    trained, held_out = set(), set()
    for seed in range(12):
        for split, seen in (("train", trained), ("held_out", held_out)):
            rows = task.dataset(split, 60, seed)  # type: ignore[arg-type]
            assert len(set(rows["key"])) == 60
            assert all(split_of(name, key) == split for key in rows["key"])
            seen.update(rows["key"])
            seen.update(rows["prompt"])
    assert not trained & held_out


@pytest.mark.parametrize("name", task_names())
def test_same_seed_same_rows_in_another_process(name: str) -> None:
    program = (
        "import json; from lorakit.recipes.tasks import get_task; "
        f"print(json.dumps(get_task({name!r}).dataset('train', 5, 3).to_list()))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(other) == get_task(name).dataset("train", 5, 3).to_list()


@pytest.mark.parametrize("name", task_names())
def test_seeds_differ(name: str) -> None:
    task = get_task(name)
    assert task.dataset("train", 5, 0).to_list() != task.dataset("train", 5, 1).to_list()


@pytest.mark.parametrize("name", task_names())
def test_gold_is_accepted_and_nonsense_refused(name: str) -> None:
    task = get_task(name)
    for row in task.dataset("held_out", 40, 0):
        assert task.check(row["completion"], row)
        assert task.check(row["completion"] + "\n", row)
        for wrong in ("", row["prompt"], f"```\n{row['completion']}\n```", f"Answer: {row['completion']}"):
            assert not task.check(wrong, row)


GOLD_JSON = {"completion": '{"name": "Ann Lee", "age": 30, "city": "York"}'}


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ('{"city": "York", "age": 30, "name": "Ann Lee"}', True),
        ('{"name": "Ann Lee", "age": "30", "city": "York"}', False),
        ('{"name": "Ann Lee", "age": 30.0, "city": "York"}', False),
        ('{"name": "Ann Lea", "age": 30, "city": "York"}', False),
        ('{"name": "Ann Lee", "age": 30}', False),
        ('{"name": "Ann Lee", "age": 30, "city": "York", "x": 1}', False),
        ("[1]", False),
    ],
)
def test_contact_json_near_misses(prediction: str, right: bool) -> None:
    assert get_task("contact_json").check(prediction, GOLD_JSON) is right


GOLD_SQL = {"completion": "SELECT name FROM staff WHERE team = 'Sales' AND age < 40"}


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("select name from staff where age < 40 and team = 'Sales' order by name;", True),
        ("SELECT name FROM staff WHERE team = 'Sales' AND age <= 40", False),
        ("SELECT name FROM staff WHERE team = 'Legal' AND age < 40", False),
        ("SELECT name, age FROM staff WHERE team = 'Sales' AND age < 40", False),
        ("SELECT COUNT(*) FROM staff WHERE team = 'Sales' AND age < 40", False),
        ("SELECT name FROM people", False),
        ("DROP TABLE staff", False),
        ("SELECT name FROM staff; DROP TABLE staff", False),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n", False),
        ("SELECT 'a\0b'", False),
    ],
)
def test_text_to_sql_near_misses(prediction: str, right: bool) -> None:
    assert get_task("text_to_sql").check(prediction, GOLD_SQL) is right


def test_a_destructive_query_changes_nothing_for_the_next() -> None:
    task = get_task("text_to_sql")
    assert not task.check("DELETE FROM staff", GOLD_SQL)
    assert task.check(GOLD_SQL["completion"], GOLD_SQL)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("Four hundred and twenty-one", True),
        ("four hundred twenty-one", False),
        ("four hundred and twenty-two", False),
        ("four hundred and twenty one", False),
    ],
)
def test_number_words_near_misses(prediction: str, right: bool) -> None:
    assert get_task("number_words").check(prediction, {"completion": "four hundred and twenty-one"}) is right


@pytest.mark.parametrize(("arguments", "word"), [(("test", 1, 0), "split"), (("train", 0, 0), "size")])
def test_bad_dataset_arguments(arguments: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        get_task("number_words").dataset(*arguments)


def test_more_rows_than_there_are() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        get_task("number_words").dataset("held_out", 900, 0)


def test_unknown_task_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="contact_json"):
        get_task("no_such")
