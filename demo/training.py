"""A small tenant, trained beside the engine: in a process of its own, on one thread and with the lowest priority."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.errors import ConfigError, LorakitError

_BAR = re.compile(r"(\d+)/(\d+) \[")
_LOSS = re.compile(r"loss=([0-9.]+)")
_BATCH = 4


class TrainingError(LorakitError, RuntimeError):
    """The recipe has failed."""


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
        step: steps that are done.
        steps: all of them; 0 before the first.
        losses: of the steps until now.
    """

    step: int
    steps: int
    losses: tuple[float, ...]


class Trainer:
    """Trains one tenant at a time."""

    def __init__(self, base: str) -> None:
        """Trains nothing yet.

        Args:
            base: what is trained on, as the recipe takes it.
        """
        self._base = base
        self._turn = threading.Lock()

    def train(
        self, rows: Sequence[dict[str, str]], folder: Path, *, epochs: int, every: float = 0.5
    ) -> Iterator[Progress]:
        """Trains, and tells how far it is; when it is exhausted, the checkpoint is in `folder / "run"`.

        Whoever stops asking ends the training.

        Args:
            rows: of `read_table`.
            folder: for the recipe's files.
            epochs: passes over the rows.
            every: seconds between two tellings.

        Raises:
            ConfigError: another one is under way.
            TrainingError: the recipe has failed.
        """
        if not self._turn.acquire(blocking=False):
            raise ConfigError("another tenant is being trained; wait until it is done.")
        try:
            yield from self._run(self._recipe(rows, folder, epochs), folder, every)
        finally:
            self._turn.release()

    def _recipe(self, rows: Sequence[dict[str, str]], folder: Path, epochs: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "base_model": self._base,
            "train_file": str(folder / "rows.jsonl"),
            "batch_size": _BATCH,
            "epochs": epochs,
            "rank": 8,
            "alpha": 16,
            "device": "cpu" if not _has_gpu() else "auto",
        }
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        return recipe

    def _run(self, recipe: Path, folder: Path, every: float) -> Iterator[Progress]:
        log = folder / "train.log"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with log.open("wb") as sink:
            child = subprocess.Popen(
                [*_last(), sys.executable, "-m", "lorakit", "train", str(recipe)],
                stdout=sink,
                stderr=sink,
                env={**os.environ, **threads, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        try:
            while True:
                try:
                    child.wait(every)
                    break
                except subprocess.TimeoutExpired:
                    yield _progress(log)
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            raise TrainingError(f"the training failed: {_last_line(log)}")
        yield _progress(log)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _last() -> list[str]:
    """What makes a command wait for all others."""
    return ["nice", "-n", "19"] if shutil.which("nice") else []


def _progress(log: Path) -> Progress:
    """What the recipe's bar says."""
    text = log.read_text(encoding="utf-8", errors="replace")
    bars = [(int(done), int(steps)) for done, steps in _BAR.findall(text)]
    steps = max((steps for _, steps in bars), default=0)
    done = max((done for done, of in bars if of == steps), default=0)
    losses: list[float] = []
    for loss in map(float, _LOSS.findall(text)):
        if not losses or losses[-1] != loss:  # the bar is drawn more often than the loss changes
            losses.append(loss)
    return Progress(done, steps, tuple(losses))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    return next((line for line in reversed(lines) if line and not _BAR.search(line)), "it said nothing")[:500]
