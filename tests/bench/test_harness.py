"""What every benchmark shares."""

import json

from lorakit.bench.harness import save, save_cells
from lorakit.bench.served import save_each


def test_results_are_saved_after_each_part(tmp_path):
    path = tmp_path / "new" / "some.json"

    def states():
        for count in (1, 2):
            yield dict.fromkeys("ab"[:count], count)
            assert json.loads(path.read_text())["results"] == dict.fromkeys("ab"[:count], count)

    assert save_each("some", path.parent, {"rows": 1}, states()) == (path, {"a": 2, "b": 2})
    assert [file.name for file in path.parent.iterdir()] == ["some.json"]
    content = json.loads(path.read_text())
    assert content["setting"] == {"rows": 1} and content["environment"]["versions"]["torch"]


def test_no_part_begins_after_its_time(tmp_path, capsys):
    begun = []

    def states():
        for part in range(3):
            begun.append(part)
            yield {"part": part}

    assert save_each("some", tmp_path, {}, states(), seconds=0)[1] == {"part": 0}
    assert begun == [0] and "stopped after 0 s" in capsys.readouterr().out


def test_cells_of_several_runs(tmp_path):
    save_cells("some", tmp_path, "a", {"requests": 1}, {"x": 1})
    save_cells("some", tmp_path, "b", {"requests": 2}, {"x": 2})
    path, cells = save_cells("some", tmp_path, "a", {"requests": 3}, {"x": 3})
    assert json.loads(path.read_text()) == {"benchmark": "some", "cells": json.loads(json.dumps(cells))}
    found = {name: (cell["setting"]["requests"], cell["results"]["x"]) for name, cell in cells.items()}
    assert found == {"a": (3, 3), "b": (2, 2)}
    assert all(cell["environment"]["date"] for cell in cells.values())


def test_a_file_is_replaced_whole(tmp_path):
    path = save("some", tmp_path, {}, {"x": 1})
    before = path.read_text()
    assert save("some", tmp_path, {}, {"x": 2}) == path and path.read_text() != before
