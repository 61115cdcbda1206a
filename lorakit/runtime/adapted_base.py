"""The base with its adapted modules: which of them ask a batch for their adapters' shares, and which batch.

Modules are hooked when the first adapter comes that touches them, and stay so: without a batch they are the base's own.
Knows rows, slots and modules; no name of an adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lorakit.adapters.form import Kind
from lorakit.adapters.layout import ModuleLayout
from lorakit.errors import BankError
from lorakit.runtime import ops
from lorakit.runtime.experts import AdaptedExperts, AdaptedParameter
from lorakit.runtime.factors import FactorStacks
from lorakit.runtime.layers import AdaptedModule, Batch
from lorakit.runtime.placement import check_placement
from lorakit.runtime.pool import plain_tensors
from lorakit.runtime.routers import AdaptedRouter
from lorakit.runtime.routing import Routing
from lorakit.runtime.rows import Rows
from lorakit.runtime.sharding import Shards
from lorakit.runtime.siblings import SiblingFinder, Siblings
from lorakit.runtime.stacking import Stacking
from lorakit.runtime.table import AddressTable
from lorakit.runtime.vocabulary import AddedTokens, LogitsMask


class Formed(NamedTuple):
    """The batches that were formed for a forward, for whom, and what their stacks were made of.

    Attributes:
        kernels: whether kernels were asked for.
        dtype: the base's dtype then.
        batches: the batches.
        factors: the stacked factors of batches without kernels.
    """

    kernels: bool
    dtype: torch.dtype
    batches: tuple[Batch, ...]
    factors: FactorStacks


class AdaptedBase:
    """A base, and the batches that its modules ask.

    Attributes:
        modules: path → the adapted module or parameter.
        siblings: path → the group of modules that it is served with.
        finder: is told of modules that are called alone, and finds out who are siblings.
        table: where kernels find the adapters on the device.
        device: where adapters lie.
        keeps_bits: whether rows without adapters must have the base's own bits. Where they need not, siblings' own
            products may be one launch, and stacked factors may lie together otherwise.
        last: the batches that were formed last: for the same rows they serve again.
    """

    def __init__(self, model: PreTrainedModel, output: str | None, shards: Shards | None) -> None:
        """Hooks nothing yet.

        Args:
            model: the base.
            output: the path of its output layer, if it has one.
            shards: this process's part of it, if several share it.
        """
        self.modules: dict[str, AdaptedModule | AdaptedParameter] = {}
        self.siblings: dict[str, Siblings] = {}
        self.finder = SiblingFinder()
        self.device = model.device
        self.table = AddressTable(self.device, self.modules)
        self.keeps_bits = True
        self.last: Formed | None = None
        self._model = model
        self._output = output
        self._shards = shards
        self._active: list[AdaptedModule | AdaptedParameter | Siblings | LogitsMask] = []
        self._mask: LogitsMask | None = None

    def follow(self) -> None:
        """Goes where the base has gone: what is known of adapters on another device is of no use any more."""
        self.last = None
        self.device = self._model.device
        self.table = AddressTable(self.device, self.modules)

    def keep_bits(self, keeps: bool) -> None:
        """See `keeps_bits`."""
        self.keeps_bits = keeps
        self._let_join(self.siblings.values())

    def adapt(self, rows: Rows) -> None:
        """Hooks the modules that these rows' adapters touch and that have no hook yet; errors as in `adapt_modules`."""
        touched = set(rows.touched)
        modules = [module for slot in rows.used for module in slot.layout.modules if module.path in touched]
        self.adapt_modules(modules, shared=rows.shared)

    def adapt_modules(self, modules: Iterable[ModuleLayout], *, shared: bool) -> None:
        """The same for modules of layouts.

        Args:
            modules: of any adapters.
            shared: whether adapters act on parts of a module's input.

        Raises:
            BankError: a layout cannot be.
            UnsupportedMethodError: a module is given what cannot be told apart by rows.
        """
        kinds: dict[str, Kind] = {}
        for module in modules:
            kinds[module.path] = module.kind
            if module.added and module.kind == "linear" and module.path != self._output:
                raise BankError(
                    f"an adapter adds tokens to the vocabulary at {module.path}, which is no output layer: its bank is "
                    "not lorakit's, or is damaged."
                )
        for path, kind in kinds.items():
            owner = path.rpartition(".")[0] if kind in ("experts", "router") else path
            if shared:
                check_placement(self._model, owner)
            if path not in self.modules:
                found = self._model.get_submodule(owner)
                if kind == "experts":
                    experts = AdaptedExperts(owner, found)
                    self.modules |= {parameter.path: parameter for parameter in experts.parameters.values()}
                elif kind == "router":
                    self.modules[path] = AdaptedRouter(path, found)
                else:
                    within = None if self._shards is None else self._shards.partial_sums(path)
                    self.modules[path] = AdaptedModule(path, found, within)

    def apart(self, rows: Rows, at_output: Rows, touched: frozenset[str]) -> list[Rows]:
        """Rows for all modules of these paths but the output layer, and its own for that: it may see fewer tokens."""
        heads = touched & {self._output} if rows.exact else frozenset()
        body = rows._replace(paths=touched - heads)
        return [body, at_output._replace(paths=heads)] if heads else [body]

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Takes away the batch of a call that is still running: a logits processor may call its own model."""
        outer = [(part, part.batch) for part in self._active]
        active, self._active = self._active, []
        try:
            for part, _ in outer:
                part.batch = None
            yield
        finally:
            self._active = active
            for part, batch in outer:
                part.batch = batch

    @contextmanager
    def serving(self, rows: Sequence[Rows]) -> Iterator[None]:
        """Modules ask for their adapters' shares, each by the rows that it is given."""
        rows = [one for one in rows if any(one.slots)]
        active = self._active
        with ExitStack() as stack:
            for batch in self._formed(rows):
                stack.enter_context(
                    self.joined(batch) if isinstance(batch, Routing) else self._attached(batch, batch.paths)
                )
                if batch.added.at_output:
                    stack.enter_context(self._masked(batch))
            try:
                yield
            finally:
                self._active = active

    @contextmanager
    def joined(self, batch: Routing) -> Iterator[None]:
        """The same by kernels, which serve siblings together, once it is known who they are."""
        groups = dict.fromkeys(self.siblings[path] for path in batch.paths if path in self.siblings)
        alone = [path for path in batch.paths if path not in self.siblings]
        with plain_tensors():
            batch.write([*(self.modules[path] for path in alone), *(one for group in groups for one in group.modules)])
        self._active = [*self._active, *groups]
        try:
            for group in groups:
                group.batch = batch
            with self._attached(batch, alone):
                yield
        finally:
            for group in groups:
                group.batch = None
                group.forget()
            found = list(self.finder.found())
            self.siblings |= {module.path: group for group in found for module in group.modules}
            self._let_join(found)

    @contextmanager
    def _attached(self, batch: Batch, paths: Collection[str]) -> Iterator[None]:
        """Modules of these paths ask the batch for their adapters' shares."""
        modules = [self.modules[path] for path in paths]
        self._active = [*self._active, *modules]
        try:
            for module in modules:
                module.batch = batch
            yield
        finally:
            for module in modules:
                module.batch = None

    @contextmanager
    def _masked(self, batch: Batch) -> Iterator[None]:
        """Keeps rows from the tokens that other rows' adapters add."""
        self._mask = self._mask or LogitsMask(self._model)
        self._active = [*self._active, self._mask]
        self._mask.batch = batch
        try:
            yield
        finally:
            self._mask.batch = None

    def _let_join(self, groups: Iterable[Siblings]) -> None:
        joins = not self.keeps_bits and ops.has_kernels(self._model.device, self._model.dtype)
        for group in groups:
            group.joins = joins

    def _formed(self, rows: Sequence[Rows]) -> tuple[Batch, ...]:
        """The batches of these rows: the last ones if they had the same, else new ones."""
        dtype = self._model.dtype
        kernels = ops.has_kernels(self._model.device, dtype) and not torch.is_grad_enabled()
        last, self.last = self.last, None  # what the last batch stacked is freed as more is stacked
        wanted = kernels, dtype, list(rows)
        if last is None or (last.kernels, last.dtype, [batch.rows for batch in last.batches]) != wanted:
            if last is not None and last.dtype != dtype:
                self.table = AddressTable(self.device, self.modules)  # an embedding's scale is rounded to its dtype
            # How factors lie together may change a product's bits.
            before = last.factors if last is not None and last.dtype == dtype and not self.keeps_bits else None
            del last
            for one in rows:
                self.adapt(one)
            factors = FactorStacks(torch.promote_types(dtype, torch.float32), before)
            with plain_tensors():
                batches = tuple(self._new_batch(one, kernels, factors) for one in rows)
            factors.forget_others()
            last = Formed(kernels, dtype, batches, factors)
        self.last = last
        return last.batches

    def _new_batch(self, rows: Rows, kernels: bool, factors: FactorStacks) -> Batch:
        # Kernels read an adapter where the pool has it, so no module may compute on another device.
        modules = [self.modules[path] for path in rows.touched]
        if kernels and all(module.device == self.device and module.aligned for module in modules):
            added = AddedTokens(rows, self.modules)
            return Routing(rows, self.table, self.finder, added, device=self._model.device)
        return Stacking(rows, self.modules, factors)
