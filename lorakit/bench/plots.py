"""The plots of the benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

OURS, THEIRS = "#4c72b0", "#c44e52"


def bars(
    path: Path, values: Mapping[str, float], axis: str, *, labels: Collection[str], theirs: str | None = None
) -> None:
    """A bar a system, from top to bottom.

    Args:
        path: of the picture.
        values: name → median.
        axis: what they are, with their unit.
        labels: behind each bar, in the same order.
        theirs: how the names of the systems begin that we are compared with; None: there are none.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.4 * len(values)), layout="constrained")
    colors = [OURS if theirs is None or not name.startswith(theirs) else THEIRS for name in values]
    axes.bar_label(axes.barh(list(values), list(values.values()), color=colors), list(labels), padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values.values()) * 1.25)
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
