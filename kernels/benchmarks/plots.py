"""The plots of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = ("#c44e52", "#dd8452", "#8c8c8c", "#937860")


def three(values: Mapping[str, float]) -> list[str]:
    """Minimum, median and maximum, for a table."""
    return [f"{values[key]:.2f}" for key in ("min", "median", "max")]


def bars(
    path: Path,
    cases: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    label: str,
    *,
    marks: Sequence[float | None],
    log: bool = False,
) -> None:
    """Bars side by side, a block a case; a mark is a line across its block. A series without values is left out."""
    pyplot = _pyplot()
    shown = {name: values for name, values in series.items() if any(value is not None for value in values)}
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.2 * len(cases) * (len(shown) + 1)), layout="constrained")
    colors = _colors(shown)
    width = 1 / (len(shown) + 1)
    # On a logarithmic axis bars begin where it does.
    values = [value for row in shown.values() for value in row if value is not None]
    most, least = max(values), min(value for value in values if value > 0) / 2 if log else 0
    for place, (name, row) in enumerate(shown.items()):
        at = [case + (place + 1) * width for case, value in enumerate(row) if value is not None]
        present = [value for value in row if value is not None]
        drawn = axes.barh(at, present, height=width * 0.9, color=colors[name], label=name)
        axes.bar_label(drawn, [f"{value:.1f}" for value in present], padding=3, fontsize=8)
    for case, mark in enumerate(marks):
        if mark is not None:
            named = any(line.get_label() == "mark" for line in axes.lines)
            axes.plot(
                [mark, mark],
                [case + width / 2, case + 1 - width / 2],
                color="black",
                lw=1,
                ls="--",
                label=None if named else "mark",
            )
    if log:
        axes.set_xscale("log")
        axes.set_xlim(least, most * 2)
    else:
        axes.set_xlim(min(0, *values) * 1.1, most * 1.15)
    axes.set_yticks([case + 0.5 for case in range(len(cases))], cases)
    axes.set_ylim(len(cases), 0)
    axes.set_xlabel(label)
    _finish(figure, axes, path)


def lines(
    path: Path, xs: Sequence[int], series: Mapping[str, Sequence[float | None]], x_label: str, y_label: str
) -> None:
    """Lines on logarithmic axes; floors are dashed. A series without values is left out."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    shown = {name: row for name, row in series.items() if any(value is not None for value in row)}
    colors = _colors([name for name in shown if "floor" not in name])
    for name, row in shown.items():
        present = [(x, value) for x, value in zip(xs, row, strict=True) if value is not None]
        if "floor" in name:
            style: dict[str, Any] = {"color": "black", "ls": ":" if name.startswith("read") else "--", "lw": 1}
        else:
            style = {"color": colors[name], "marker": "o", "ms": 4}
        axes.plot(*zip(*present, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _finish(figure, axes, path)


def points(
    path: Path,
    values: Mapping[str, tuple[float, float]],
    fit: tuple[float, float],
    special: str,
    x_label: str,
    y_label: str,
) -> None:
    """Named points and a line (constant, slope) through them; one of the points stands out."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    most = max(x for x, _ in values.values())
    axes.plot([0, most], [fit[0], fit[0] + fit[1] * most], color="#8c8c8c", lw=1, ls="--", label="fit of uniform ranks")
    for name, (x, y) in values.items():
        axes.plot(x, y, "o", color="#c44e52" if name == special else "#4c72b0")
        place = (-4, 14) if "," in name else (6, -12)
        axes.annotate(name, (x, y), xytext=place, textcoords="offset points", fontsize=8)
    axes.set_xlim(0, most * 1.12)
    axes.set_ylim(0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _finish(figure, axes, path)


def _colors(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Ours in blue, others in a colour of their own."""
    blues, others = iter(("#4c72b0", "#a1b8dc")), iter(COLORS)
    return {name: next(blues if name.startswith("lorakit") else others) for name in names}


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
