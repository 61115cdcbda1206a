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


def curves(path: Path, parameters: Mapping[str, Mapping[str, Mapping[str, float]]], left: str, right: str) -> None:
    """A panel a parameter: two results over its values, each with an axis of its own.

    Args:
        path: of the picture.
        parameters: name → value → result → number.
        left: the result on the left axis.
        right: the one on the right, logarithmic.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(parameters)
    figure, panels = pyplot.subplots(-(-count // 2), 2, figsize=(9, 1.2 * count), layout="constrained", squeeze=False)
    for axes, (name, values) in zip(panels.flat, parameters.items(), strict=False):
        other = axes.twinx()
        axes.plot(list(values), [one[left] for one in values.values()], "o-", color=OURS)
        other.plot(list(values), [one[right] for one in values.values()], "s--", color=THEIRS)
        other.set_yscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel(left.replace("_", " "), color=OURS)
        other.set_ylabel(right.replace("_", " "), color=THEIRS)
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
