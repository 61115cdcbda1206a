"""The loss curve of a run, as a picture beside its checkpoint."""

from collections.abc import Sequence
from pathlib import Path


def save_loss_plot(steps: Sequence[int], losses: Sequence[float], path: Path, title: str) -> None:
    """Draws loss (nats a completion token) over optimizer steps into a PNG file.

    Args:
        steps: Optimizer steps at which the loss was recorded.
        losses: As many losses.
        path: The PNG file to write.
        title: What stands above the curve.
    """
    # The object interface draws with Agg and leaves pyplot's global state, a notebook's backend say, alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, linewidth=1.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats a completion token)")
    if losses and min(losses) > 0:
        axes.set_yscale("log")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
