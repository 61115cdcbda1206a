"""The plots of the benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lorakit.scheduler.report import draw_working_sets, gpus_in
from lorakit.scheduler.sample import Sample

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


def fleets(
    path: Path,
    title: str,
    load: tuple[Sequence[float], Sequence[float]],
    runs: Mapping[str, Sequence[Sample]],
    limit: int,
) -> None:
    """A load over time, the replicas that each run had in use, and the working sets of each.

    Args:
        path: of the picture.
        title: names the hardware.
        load: seconds, and requests a second there.
        runs: name → samples at even distances.
        limit: requests of a working set at most.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    replicas = max(map(gpus_in, runs.values()))
    heights = [1.6, 1.4, *[0.5 + 0.22 * replicas] * len(runs)]
    figure, (rate, used, *sets) = pyplot.subplots(
        len(heights),
        1,
        figsize=(9, 1.0 + sum(heights)),
        sharex=True,
        layout="constrained",
        height_ratios=heights,
    )
    rate.set_title(title)
    rate.plot([second / 60 for second in load[0]], list(load[1]), color="black")
    rate.set_ylabel("requests/s")
    rate.set_ylim(bottom=0)
    for (name, samples), color, style in zip(runs.items(), (OURS, THEIRS, THEIRS), ("-", "--", ":"), strict=False):
        minutes = [sample.seconds / 60 for sample in samples]
        in_use = [sample.gpus for sample in samples]
        used.step(minutes, in_use, style, where="post", color=color, label=name)
    used.set_ylabel("replicas in use")
    used.set_ylim(0, replicas + 0.5)
    used.legend(ncols=3)
    for axes in (rate, used):
        axes.spines[["top", "right"]].set_visible(False)
    shown = None
    for axes, (name, samples) in zip(sets, runs.items(), strict=True):
        shown = draw_working_sets(axes, samples, replicas, limit)
        axes.set_ylabel("replica")
        axes.set_title(f"{name}: working sets", fontsize="medium")
        axes.set_yticks(range(replicas) if replicas <= 8 else range(0, replicas, 4))
    figure.colorbar(shown, ax=sets, label="requests")
    sets[-1].set_xlabel("minutes")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
