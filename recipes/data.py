"""Rows to train on: prompt and completion, each a list of chat messages."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from lorakit.errors import ConfigError

from .config import FinetuneConfig
from .tasks import get_task

Message = dict[str, str]


def training_rows(config: FinetuneConfig) -> Dataset:
    """The rows that a config names.

    Returns:
        `Dataset` with the columns `prompt` and `completion`, each a list of `{"role", "content"}`: TRL's
        conversational prompt-completion format, in which the loss counts the completion's tokens alone.

    Raises:
        ConfigError: Unknown task, a file that cannot be read, or a line in no known format (the message names it).
    """
    if config.task is not None:
        rows = get_task(config.task).dataset("train", config.train_size, config.seed)
        return Dataset.from_list([as_messages(prompt, answer) for prompt, answer in _pairs(rows)])
    assert config.train_file is not None  # the config holds exactly one of the two
    return Dataset.from_list(read_jsonl(config.train_file))


def _pairs(rows: Dataset) -> list[tuple[str, str]]:
    return list(zip(rows["prompt"], rows["completion"], strict=True))


def as_messages(prompt: str, completion: str) -> dict[str, list[Message]]:
    """One row: the user says the prompt, the assistant the completion."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def read_jsonl(path: Path) -> list[dict[str, list[Message]]]:
    """Reads a JSON Lines file; a line is `{"prompt": text, "completion": text}` or `{"messages": [...]}`.

    Of `messages` the last must be the assistant's: it is the completion, all before it is the prompt. Earlier turns
    of the assistant are context and not trained on. Empty lines are skipped.

    Raises:
        ConfigError: The file cannot be read or holds no rows, or a line is in neither format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"train_file {path} cannot be read: {error}") from error
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ConfigError(f"train_file {path} holds no rows.")
    return rows


def _row(line: str, where: str) -> dict[str, list[Message]]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: no JSON ({error}). Write one JSON object a line.") from error
    if isinstance(row, dict) and "messages" in row:
        messages = row["messages"]
        if not (
            isinstance(messages, list) and len(messages) >= 2 and all(_is_message(message) for message in messages)
        ):
            raise ConfigError(f'{where}: messages must be two or more of {{"role": text, "content": text}}.')
        if messages[-1]["role"] != "assistant":
            raise ConfigError(f"{where}: the last message must be the assistant's: it is what is learned.")
        kept = [{"role": message["role"], "content": message["content"]} for message in messages]
        return {"prompt": kept[:-1], "completion": kept[-1:]}
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        if not row["completion"]:
            raise ConfigError(f"{where}: the completion is empty: there is nothing to learn from it.")
        return as_messages(row["prompt"], row["completion"])
    raise ConfigError(f'{where}: give {{"prompt": text, "completion": text}} or {{"messages": [...]}}.')


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
