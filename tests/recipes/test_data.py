"""Reading a user's own JSON Lines."""

import json
from pathlib import Path

import pytest

from lorakit.errors import ConfigError
from lorakit.recipes.data import read_jsonl


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_both_formats(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a", "extra": 1},
    ]
    first, second = read_jsonl(
        write(tmp_path, '{"prompt": "p", "completion": "c"}', "", json.dumps({"messages": turns}))
    )
    assert first["prompt"] == [{"role": "user", "content": "p"}]
    assert first["completion"] == [{"role": "assistant", "content": "c"}]
    assert second["prompt"] == turns[:2]
    assert second["completion"] == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": "p"}',
        '{"prompt": 1, "completion": "c"}',
        '{"prompt": "p", "completion": ""}',
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "u"}, {"role": "user", "content": "u"}]}',
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}',
    ],
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        read_jsonl(write(tmp_path, '{"prompt": "p", "completion": "c"}', line))


def test_empty_or_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        read_jsonl(write(tmp_path, ""))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
