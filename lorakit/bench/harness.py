"""What every benchmark shares: the record of the machine, the statistics, the saved result."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.console import make_console, table

_PACKAGES = ("lorakit", "torch", "transformers", "peft", "triton", "safetensors", "liger-kernel")


def statistics_of(values: Sequence[float]) -> dict[str, float | int]:
    """Minimum, median and maximum of repeated measurements, and how many they are."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "runs": len(values)}


def environment() -> dict[str, Any]:
    """Hardware, versions and commit: what a number means nothing without."""
    import torch

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def save(name: str, folder: Path, setting: dict[str, Any], results: dict[str, Any]) -> Path:
    """Writes `folder/name.json`: environment, setting and results.

    Args:
        name: the benchmark's.
        folder: made if it is not there.
        setting: what was measured: shapes, batch, repeats.
        results: what came out, each number with its unit in its key.
    """
    content = {"benchmark": name, "environment": environment(), "setting": setting, "results": results}
    return _write(folder / f"{name}.json", content)


def save_cells(
    name: str, folder: Path, cell: str, setting: dict[str, Any], results: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Writes one cell of `folder/name.json`; the other cells, of earlier runs, stay as they are.

    Args:
        name: the benchmark's.
        folder: made if it is not there.
        cell: its name.
        setting: as `save` takes it.
        results: as `save` takes it.

    Returns:
        The file, and all its cells: name → {"environment", "setting", "results"}.
    """
    path = folder / f"{name}.json"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
    cells[cell] = {"environment": environment(), "setting": setting, "results": results}
    return _write(path, {"benchmark": name, "cells": cells}), cells


def _write(path: Path, content: dict[str, Any]) -> Path:
    """Writes a file in one step: a run may be cut off at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return fresh.replace(path)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path) -> None:
    """Prints a result's table, and where it was saved."""
    console = make_console()
    console.print(table(title, columns, rows))
    console.print(f"saved in {path}")


def _commit() -> str | None:
    """The checkout's commit, marked when it has changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        # A result's own file may differ: it is what is being written.
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/lorakit", ":/kernels"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
