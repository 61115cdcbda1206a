"""Shards: the part of every adapter that one process of a tensor-parallel base keeps.

transformers shares the weights of a base's linear modules out over the processes of a mesh, mostly a process a GPU. At
a module whose outputs are shared out, a process keeps the same rows of B, c, d and w as it has of W, and A whole. At
one whose inputs are, it keeps the columns of A and w, and B and c whole; the first process has d, and the others zeros,
so that it is added once. At all other modules (embeddings, norms, output layers and others whose outputs are gathered)
every process keeps the adapter's part whole.

An adapter is cut in host memory, so its shard alone is copied to the device. Its extent has the same size in all
processes, and so they evict alike. Knows layouts and a base's plan; no slot and no batch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters.form import Kind
from lorakit.adapters.layout import Extent, Layout, ModuleLayout
from lorakit.adapters.sharded import is_sharded, own_places, shared_dim
from lorakit.errors import BankError, ConfigError, MissingDependencyError, UnsupportedMethodError
from lorakit.runtime.host_cache import ExtentReader
from lorakit.runtime.partial_sums import PartialSums, Style, partial_sums_of

_BY_OUTPUTS = frozenset({"colwise", "packed_colwise"})
_BY_INPUTS = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input"})
_WHOLE = frozenset(
    {
        None,
        "colwise_gather_output",
        "colwise_rep",
        "embedding_colwise",
        "embedding_rowwise",
        "mla_kv_a_proj",
        "replicate",
        "replicated_with_grad_allreduce",
    }
)
"""Styles at which a module is given all of its input and returns all of its output, or each process works alone."""

_DIMS = {"out": {"b": 0, "c": 0, "d": 0, "w": 0}, "in": {"a": 1, "w": 1}}
"""By which axis a module is shared out → the dimensions along which its adapters' tensors are, too."""

_OTHER_SIZES = ("pp_size", "fsdp_size", "dp_replicate_size", "ep_size")

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
"""As transformers' plans have them, the numbers of layers are `*`."""

_HARMLESS_AROUND = frozenset({None, "local_params", "replicate", "replicated_with_grad_allreduce"})
"""Styles of a module that say nothing of the modules inside it."""


class Cut(NamedTuple):
    """How a module is shared out.

    Attributes:
        by: "out" or "in", of which of its two axes each process has some places.
        places: how many there are.
        ranges: this process's, first and after the last, ascending.
        most: the largest number of places that any process has.
        first: whether this is the process that adds what is added once.
    """

    by: str
    places: int
    ranges: tuple[tuple[int, int], ...]
    most: int
    first: bool

    @property
    def own(self) -> int:
        """This process's number of places."""
        return sum(after - begin for begin, after in self.ranges)


class Shards:
    """How a base's modules are shared out, and the shards of adapters that follow from it."""

    def __init__(self, model: PreTrainedModel, styles: Mapping[str, Style]) -> None:
        """Looks at nothing yet.

        Args:
            model: loaded by transformers with a plan for tensor parallelism.
            styles: transformers' own, by their names.
        """
        self._model = model
        self._styles = styles
        self._plan: Mapping[str, str] = model.tp_plan or {}
        mesh: Any = model._device_mesh
        self._mesh = mesh["tp"] if mesh.mesh_dim_names else mesh
        self._cuts: dict[str, Cut | None] = {}
        self._layouts: dict[str, Layout] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Shards | None:
        """The shards of a base; None for one that this process has whole.

        Raises:
            ConfigError: the base is shared out in another way than by transformers' tensor parallelism.
            MissingDependencyError: transformers is too old.
        """
        tp_size = getattr(model, "_tp_size", None) or 1
        if tp_size == 1 and not any(is_sharded(parameter) for parameter in model.parameters()):
            return None
        config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
        if tp_size == 1 or any((getattr(config, name, 1) or 1) > 1 for name in _OTHER_SIZES):
            raise ConfigError(
                "the base's weights are shared out over processes in a way that adapters cannot follow; load it by "
                "from_pretrained(..., distributed_config=DistributedConfig(tp_size=...)), by tensor parallelism alone."
            )
        try:
            from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
        except ImportError as error:
            raise MissingDependencyError(
                'adapters on a tensor-parallel base need a newer transformers: pip install "transformers>=5.23".'
            ) from error
        assert isinstance(model, PreTrainedModel)
        return cls(model, ALL_PARALLEL_STYLES)

    @property
    def processes(self) -> int:
        """How many processes share the base."""
        size: int = self._mesh.size()
        return size

    @property
    def is_first(self) -> bool:
        """Whether this is the first of them."""
        rank: int = self._mesh.get_local_rank()
        return rank == 0

    def partial_sums(self, path: str) -> PartialSums | None:
        """Where adapters act at a module, if not on what it returns.

        Args:
            path: a linear module that `layout` did not refuse.
        """
        cut = self._cut(path)
        if cut is None or cut.by == "out":
            return None
        style = self._style(path)
        assert style is not None
        linear = self._model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        return partial_sums_of(linear, self._styles[style], self._mesh)

    def layout(self, layout: Layout, name: str) -> Layout:
        """Where the tensors of a shard lie.

        Args:
            layout: the whole adapter's.
            name: the adapter's, for messages.

        Raises:
            UnsupportedMethodError: it has a module that is shared out in a way that it cannot follow.
            BankError: it is of another base.
        """
        if layout.key not in self._layouts:
            self._layouts[layout.key] = Layout.placing([self._sized(module, name) for module in layout.modules])
        return self._layouts[layout.key]

    def reader(self, source: ExtentReader, name: str) -> ExtentReader:
        """Reads the shard of an adapter, for which the whole is read into host memory.

        Args:
            source: the whole adapter.
            name: its name, for messages.

        Raises:
            UnsupportedMethodError, BankError: as `layout`.
        """
        layout = self.layout(source.layout, name)

        def read_into(buffer: torch.Tensor) -> Extent:
            extent = source.read_into(torch.empty(source.nbytes, dtype=torch.uint8, device="cpu"))
            return self._fill(buffer, extent, layout)

        return ExtentReader(layout, source.dtype, read_into)

    def extent(self, extent: Extent, name: str) -> Extent:
        """The shard of an adapter in memory.

        Args:
            extent: the whole adapter.
            name: its name, for messages.

        Raises:
            UnsupportedMethodError, BankError: as `layout`.
        """
        layout = self.layout(extent.layout, name)
        return self._fill(torch.empty(layout.nbytes(extent.dtype), dtype=torch.uint8, device="cpu"), extent, layout)

    def _fill(self, buffer: torch.Tensor, extent: Extent, layout: Layout) -> Extent:
        """Writes the shard of a whole extent into a buffer of just its size."""
        shard = Extent.of_bytes(layout, extent.dtype, buffer.zero_())
        parts = shard.modules()
        for path, form in extent.modules().items():
            cut, targets = self._cut(path), dict(parts[path].tensors())
            for item, tensor in form.tensors():
                _copy(targets[item], tensor, item, cut)
        return shard

    def _sized(self, module: ModuleLayout, name: str) -> tuple[ModuleLayout, dict[str, int]]:
        """A module's shapes in a shard, and the elements of its tensors in the largest shard of all processes."""
        try:
            cut = self._cut(module.path, module.kind)
            if cut is not None and module.added:
                raise ValueError("to whose outputs it adds tokens, of which each process would have all")
        except ValueError as error:
            raise UnsupportedMethodError(
                f"adapter {name!r} cannot be served on a base that {self.processes} processes share: it acts on "
                f"{module.path!r}, {error}. Train it without that module, or load the base without tensor parallelism."
            ) from None
        own = largest = module
        if cut is not None:
            if cut.places != (module.out_features if cut.by == "out" else module.in_features):
                raise BankError(f"adapter {name!r} has other sizes at {module.path!r} than the base; export it again.")
            own, largest = (_with(module, cut.by, places) for places in (cut.own, cut.most))
        return own, {span.item: prod(span.shape) for span in (*largest.weights(), *largest.vectors())}

    def _cut(self, path: str, kind: Kind = "linear") -> Cut | None:
        """How a module is shared out; None where each process has an adapter's part whole.

        Raises:
            ValueError: in words that go on after the module's name.
        """
        if path not in self._cuts:
            self._cuts[path] = self._new_cut(path, kind)
        return self._cuts[path]

    def _new_cut(self, path: str, kind: Kind) -> Cut | None:
        parents = path.split(".")[:-1]
        around = {self._style(".".join(parents[: i + 1])) for i in range(len(parents))}
        if not around <= _HARMLESS_AROUND:
            raise ValueError(f"which lies in a module of the style {max(around - _HARMLESS_AROUND, key=str)!r}")
        style = self._style(path)
        if style not in _WHOLE | _BY_OUTPUTS | _BY_INPUTS:
            raise ValueError(f"whose style is {style!r}")
        if kind in ("experts", "router"):
            tensor: Any = self._model.get_parameter(path)
        else:
            tensor = getattr(self._model.get_submodule(path), "weight", None)
        dim = shared_dim(tensor) if isinstance(tensor, torch.Tensor) else None
        if style in _WHOLE:
            if style is None and dim is not None:
                raise ValueError("whose weight is shared out, though the plan does not say so")
            return None
        by = "out" if style in _BY_OUTPUTS else "in"
        if not isinstance(self._model.get_submodule(path), nn.Linear) or dim != (0 if by == "out" else 1):
            raise ValueError(f"whose style is {style!r}, and whose weight is packed, or not shared out so")
        # A packed weight is several in one, each of which is shared out.
        pieces, size = getattr(tensor.placements[0], "split_factor", 1), self.processes
        each = tensor.shape[dim] // pieces
        most = -(-each // size)
        if most * (size - 1) >= each:
            raise ValueError("of which some process has nothing")
        own = own_places(tensor, dim).tolist()
        return Cut(by, tensor.shape[dim], tuple(_ranges(own)), pieces * most, self.is_first)

    def _style(self, path: str) -> str | None:
        """The style by which the plan has a module or parameter shared out."""
        return self._plan.get(_NUMBER.sub(".*", path))


def _with(module: ModuleLayout, by: str, places: int) -> ModuleLayout:
    """A module of so many outputs, or inputs."""
    if by == "out":
        return dataclasses.replace(module, out_features=places)
    return dataclasses.replace(module, in_features=places)


def _copy(target: torch.Tensor, whole: torch.Tensor, item: str, cut: Cut | None) -> None:
    """Writes a module's tensor into its shard, which is zeros."""
    dim = None if cut is None else _DIMS[cut.by].get(item)
    if cut is None or (dim is None and (item != "d" or cut.first)):
        target.copy_(whole)
    elif dim is not None:
        place = 0
        for begin, after in cut.ranges:
            target.narrow(dim, place, after - begin).copy_(whole.narrow(dim, begin, after - begin))
            place += after - begin


def _ranges(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of places that ascend: first, after the last."""
    begin = 0
    for i, (place, following) in enumerate(pairwise([*places, -1]), 1):
        if following != place + 1:
            yield places[begin], place + 1
            begin = i
