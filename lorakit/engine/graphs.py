"""Forwards that were captured as CUDA graphs.

Each is of one size of a batch, and takes memory of the device that nobody counted, so there are only so many:
the one that was replayed the longest ago goes when another comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol


class Group(NamedTuple):
    """What a batch has to be, beside its size, for its forward to be one that was captured.

    Attributes:
        mode: of the adapters' launches; None for the base alone.
        pair: of tensors.
        in_place: whether prompts read the cache where it is.
    """

    mode: Hashable
    pair: int
    in_place: bool


class Graph(Protocol):
    """As `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Runs the forward, on what its tensors hold now."""

    def reset(self) -> None:
        """Gives up what it holds."""


class Graphs:
    """Captured forwards, in the place of transformers' `CudaGraphBuffer`.

    Attributes:
        group: of the batch that is to be run.
    """

    def __init__(self, most: int) -> None:
        """Has none.

        Args:
            most: that are kept.
        """
        self.group = Group(None, 0, False)
        self._most = most
        self._found: OrderedDict[tuple[Group, Hashable], Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def __del__(self) -> None:
        self.forget(lambda group: True)

    def get_graph(self, size: Hashable) -> Graph | None:
        """The forward of the group's batches of this size, if it was captured."""
        found = self._found.get((self.group, size))
        if found is not None:
            self._found.move_to_end((self.group, size))
        return found

    def set_graph(self, size: Hashable, graph: Graph) -> None:
        """Keeps a forward that was captured just now."""
        self._found[self.group, size] = graph
        if len(self._found) > self._most:
            _, oldest = self._found.popitem(last=False)
            oldest.reset()

    def forget(self, unwanted: Callable[[Group], bool]) -> None:
        """Gives the groups up of which this is true; what of them still runs is freed when it ends."""
        for group, size in list(self._found):
            if unwanted(group):
                self._found.pop((group, size)).reset()
