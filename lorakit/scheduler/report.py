"""The report of a simulation: a page, its numbers as JSON, and plots. The only file of the scheduler that draws."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.scheduler.sample import Sample
from lorakit.scheduler.simulator import Outcome
from lorakit.scheduler.summary import over_time, summary

_WINDOW = 60.0
_COLUMNS = {
    "GPU-hours": lambda one: f"{one['gpu_hours']:.2f}",
    "of the clairvoyant": lambda one: f"{one['of_clairvoyant']:.2f}",
    "first token p50": lambda one: _seconds(one["first_token_s"]["p50"]),
    "p99": lambda one: _seconds(one["first_token_s"]["p99"]),
    "a token p50": lambda one: f"{one['token_ms']['p50']:.1f} ms",
    "p99 ": lambda one: f"{one['token_ms']['p99']:.1f} ms",
    "moves": lambda one: f"{one['moves']:,}",
    "time in moves": lambda one: f"{one['time_in_moves_percent']:.3f} %",
    "GPUs started": lambda one: str(one["gpus_started"]),
    "rows a forward": lambda one: f"{one['rows_a_forward']:.1f}",
    "busy": lambda one: f"{one['busy_percent']:.0f} %",
}


def numbers(outcomes: Mapping[str, Outcome], least: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Each scheme's summary, and its GPU-hours over the least ones (`summary.bounds`)."""
    return {
        name: {
            **(found := summary(outcome)),
            "of_clairvoyant": found["gpu_hours"] / least["clairvoyant_gpu_hours"],
            "of_any_schedule": found["gpu_hours"] / least["any_schedule_gpu_hours"],
        }
        for name, outcome in outcomes.items()
    }


def rows(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table of a report: its columns, and a row a scheme."""
    columns = ["scheme", *(column.strip() for column in _COLUMNS)]
    return columns, [[name, *(shown(one) for shown in _COLUMNS.values())] for name, one in found.items()]


def write_report(
    folder: Path, outcomes: Mapping[str, Outcome], least: Mapping[str, float], setting: Mapping[str, Any]
) -> Path:
    """Writes `report.md`, `report.json` and plots into a folder.

    Args:
        folder: made if it is not there.
        outcomes: scheme → what came of the trace; with samples.
        least: as `summary.bounds` gives it.
        setting: what was simulated.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = numbers(outcomes, least)
    content = {"setting": setting, "least": least, "results": found}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plots = draw(folder, outcomes)
    columns, lines = rows(found)
    table = [columns, ["---"] * len(columns), *lines]
    page = [
        "# Simulation",
        "",
        *(f"- {name}: {value}" for name, value in setting.items()),
        f"- GPU-hours of a clairvoyant schedule: {least['clairvoyant_gpu_hours']:.2f}; "
        f"no schedule takes less than {least['any_schedule_gpu_hours']:.2f}",
        "",
        *("| " + " | ".join(line) + " |" for line in table),
        "",
        *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in plots),
    ]
    path = folder / "report.md"
    path.write_text("\n".join(page) + "\n", encoding="utf-8")
    return path


def draw(folder: Path, outcomes: Mapping[str, Outcome]) -> list[Path]:
    """Draws GPUs, queues and times to first token over time, and each scheme's working sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(9, 9), sharex=True, layout="constrained")
    for name, outcome in outcomes.items():
        minutes = [sample.seconds / 60 for sample in outcome.samples]
        axes[0].step(minutes, [sample.gpus for sample in outcome.samples], label=name, where="post")
        axes[1].plot(minutes, [sample.waiting for sample in outcome.samples], label=name)
        times = over_time(outcome, _WINDOW)
        axes[2].plot([(second + _WINDOW / 2) / 60 for second in times["seconds"]], times["p99"], label=name)
    for axis, label in zip(axes, ("GPUs in use", "requests that wait", "first token, p99 of a minute, s"), strict=True):
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_yscale("log")
    axes[2].set_xlabel("minutes")
    axes[0].legend(ncols=2)
    paths = [folder / "over_time.png"]
    figure.savefig(paths[0], dpi=110)
    pyplot.close(figure)
    for name, outcome in outcomes.items():
        path = folder / f"working_sets_{name.replace('-', '_')}.png"
        _draw_working_sets(path, outcome, name)
        paths.append(path)
    return paths


def _draw_working_sets(path: Path, outcome: Outcome, name: str) -> None:
    from matplotlib import pyplot

    gpus = gpus_in(outcome.samples)
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.16 * min(gpus, 40)), layout="constrained")
    figure.colorbar(draw_working_sets(axis, outcome.samples, gpus), label="working set")
    axis.set(xlabel="minutes", ylabel="GPU", title=name)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def gpus_in(samples: Sequence[Sample]) -> int:
    """GPUs that samples have numbers for."""
    return 1 + max((number for sample in samples for number in sample.working_sets), default=0)


def draw_working_sets(axis: Any, samples: Sequence[Sample], gpus: int, most: int | None = None) -> Any:
    """A row a GPU, its working set by colour, as the paper's figure shows it; white where there is no GPU.

    Args:
        axis: of matplotlib.
        samples: at even distances.
        gpus: rows.
        most: the working set of the last colour; None: the largest one.

    Returns:
        What a colour bar belongs to.
    """
    import numpy as np

    image = np.full((gpus, len(samples)), np.nan)
    for place, sample in enumerate(samples):
        for number, size in sample.working_sets.items():
            image[number, place] = size
    extent = (0, samples[-1].seconds / 60, -0.5, gpus - 0.5)
    return axis.imshow(image, aspect="auto", origin="lower", interpolation="nearest", extent=extent, vmin=0, vmax=most)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"
