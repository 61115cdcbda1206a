"""MultiLoraModel: one base model, and in every batch any mix of adapters.

`forward` and `generate` are the base's own with one more argument, `adapter_ids`: an adapter's name for each row, or
None for the base. Only public API of transformers is used. Knows names and modules; no request, no text.
"""

from __future__ import annotations

import inspect
import itertools
import os
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lorakit.adapters import convert, fingerprint, names
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel, architecture_class
from lorakit.adapters.choices import NONE, Choices
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.form import Kind
from lorakit.adapters.layout import Extent, Layout, ModuleLayout
from lorakit.adapters.methods.alora import invocation_of
from lorakit.adapters.peft_reader import Source
from lorakit.adapters.quantised import in_words
from lorakit.errors import (
    AdapterExistsError,
    AdapterIdsError,
    AdapterNotFoundError,
    BankCorruptedError,
    BankError,
    BaseModelMismatchError,
    BaseModelNotFoundError,
    ConfigError,
    ModelInUseError,
    UnsupportedMethodError,
)
from lorakit.runtime import ops
from lorakit.runtime.activation import Activation, Generation, Pass
from lorakit.runtime.experts import AdaptedExperts, AdaptedParameter
from lorakit.runtime.factors import FactorStacks
from lorakit.runtime.host_cache import ExtentReader, HostExtent
from lorakit.runtime.layers import AdaptedModule, Batch
from lorakit.runtime.placement import check_placement
from lorakit.runtime.pool import AdapterPool, Slot, plain_tensors
from lorakit.runtime.prompts import prompt_of, starts_of
from lorakit.runtime.routers import AdaptedRouter
from lorakit.runtime.routing import Routing
from lorakit.runtime.rows import Rows, together
from lorakit.runtime.sharding import Shards
from lorakit.runtime.siblings import SiblingFinder, Siblings
from lorakit.runtime.stacking import Stacking
from lorakit.runtime.standing import Mode, Standing, StandingRouting, can_stand
from lorakit.runtime.table import AddressTable
from lorakit.runtime.towers import Towers, has_towers, tower_paths, towers_of
from lorakit.runtime.vocabulary import AddedTokens, LogitsMask, check_ids

AdapterIds: TypeAlias = str | Sequence[str | None] | None
AloraOffsets: TypeAlias = Sequence[int | None] | None

_FEWEST_SLOTS = 64
"""Slots that a standing batch's table has room for at least, as adapters may come."""

# Where a batch's rows are counted, in this order; whatever else is a tensor comes after.
_ROW_INPUTS = ("input_ids", "inputs", "inputs_embeds", "encoder_outputs", "decoder_input_ids", "attention_mask")


class _Formed(NamedTuple):
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


class _Asked(NamedTuple):
    """What `serving` was asked for last: the slots of all tokens, those at the output, and the rows that these make."""

    slots: tuple[tuple[Slot | None, ...], tuple[Slot | None, ...]]
    rows: list[Rows]


class Adapter(NamedTuple):
    """An adapter as it is now: another may come under its name.

    Attributes:
        name: its name.
        key: what its slot is kept under, which stands for its content.
        source: where it can be read.
        invocation: the tokens from which on it acts, or None if it always does.
        added: the tokens that it adds to the vocabulary.
        pinned: whether it stays on the device once it is there.
    """

    name: str
    key: str
    source: Extent | ExtentReader
    invocation: tuple[int, ...] | None
    added: int
    pinned: bool


class _Local(NamedTuple):
    """An adapter that no bank of the model's has: its slot's key, its tensors or their reader, what activates it."""

    key: str
    extent: Extent | ExtentReader
    invocation: tuple[int, ...] | None


_Known: TypeAlias = _Local | AdapterEntry

_LOCAL = "local-"
"""Begins the keys of adapters that were loaded into a model alone: contents of a bank's are known by their hashes."""

Tier: TypeAlias = Literal["device", "host", "bank"]


class MultiLoraModel(nn.Module):
    """A transformers model that serves every adapter of a bank.

    Calls on one model from several threads take turns, and one from inside another is kept apart. Two models share no
    state, unless they wrap the same base: then they must not be called at the same time.

    Attributes:
        model: the base, its modules and weights as they were.
        bank: the bank whose adapters it serves, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: AdapterBank | str | os.PathLike[str] | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
        adapter_memory: int | None = None,
    ) -> None:
        """Wraps a base; nothing in it changes.

        Args:
            model: the base, loaded (and quantised, compiled, placed) as you like.
            bank: an open bank, its folder or its Hub id; its adapters are loaded to the device when first used.
            adapter_dtype: dtype of A and B on the device. None: as stored, which gives PEFT's outputs; where PEFT
                saved fp32 (its default), the dtype of a 16-bit base halves their bytes and rounds them.
            adapter_memory: bytes that resident adapters may take on the device; None: no limit. When it is full, the
                least recently used make room. The factors of the batch at hand are stacked beside it, in fp32.

        Raises:
            BankError: the folder holds no bank.
            BaseModelMismatchError: the bank was made for another base, or the model is one that PEFT has wrapped.
            ConfigError: the base's weights are shared out over processes by other means than tensor parallelism.
        """
        super().__init__()
        convert.check_dtype(adapter_dtype)
        if bank is not None and not isinstance(bank, AdapterBank):
            bank = AdapterBank.from_pretrained(bank)
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise BaseModelMismatchError(
                "the model has PEFT's layers inside, which would act in every row; give the base as it was loaded, and "
                "the adapters through a bank or load_adapter."
            )
        self._shards = Shards.of(model)
        self._base = BaseModel.of(model)
        if bank is not None:
            fingerprint.check(self._base, bank.fingerprint, owner=f"the bank at {bank.path}")
        self.model = model
        self.bank = bank
        self._lock = threading.RLock()
        self._adapted: dict[str, AdaptedModule | AdaptedParameter] = {}
        self._local: dict[str, _Local] = {}
        self._unloaded: set[str] = set()
        self._pinned: set[str] = set()
        self._keys = itertools.count()
        self._pool = AdapterPool(device=self.device, dtype=adapter_dtype, capacity=adapter_memory)
        self._last: _Formed | None = None
        self._asked: _Asked | None = None
        self._active: list[AdaptedModule | AdaptedParameter | Siblings | LogitsMask] = []
        self._generation: Generation | None = None
        self._multimodal = has_towers(model)
        self._mask: LogitsMask | None = None
        self._lent = False
        self._stands: dict[str, bool] = {}
        self._stood: set[str] = set()
        self._standing: dict[Mode, Standing | None] = {}
        self._finder = SiblingFinder()
        self._siblings: dict[str, Siblings] = {}
        self._table = AddressTable(self.device, self._adapted)
        self._warned: set[str] = set()
        self._followed = None if bank is None else bank.entries
        for entry in () if bank is None else bank.entries.values():
            self._compare_base(entry)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str],
        bank: AdapterBank | str | os.PathLike[str],
        *,
        adapter_dtype: torch.dtype | None = None,
        adapter_memory: int | None = None,
        **kwargs: Any,
    ) -> MultiLoraModel:
        """Loads a base and serves a bank on it.

        Args:
            base: a folder or a Hub id.
            bank: an open bank, its folder or its Hub id.
            adapter_dtype: see `MultiLoraModel`.
            adapter_memory: see `MultiLoraModel`.
            **kwargs: for the base's own `from_pretrained` (dtype, device_map, quantization_config, …).

        Raises:
            BaseModelNotFoundError: no such base, or transformers lacks the class that the bank was made for.
        """
        bank = bank if isinstance(bank, AdapterBank) else AdapterBank.from_pretrained(bank)
        model = load_base(base, str(bank.fingerprint.get("architecture")), **kwargs)
        return cls(model, bank, adapter_dtype=adapter_dtype, adapter_memory=adapter_memory)

    @property
    def adapters(self) -> list[str]:
        """Names that `adapter_ids` may hold: the bank's and those loaded into this model."""
        banked = () if self.bank is None else self.bank.names
        return [*(name for name in banked if name not in self._unloaded and name not in self._local), *self._local]

    def has_adapter(self, name: str) -> bool:
        """Whether `adapter_ids` may hold a name; however many there are, it takes no time."""
        banked = self.bank is not None and name not in self._unloaded and name in self.bank.entries
        return banked or name in self._local

    @property
    def pinned(self) -> frozenset[str]:
        """Names of adapters that stay on the device."""
        return frozenset(name for name in self._pinned if self.has_adapter(name))

    def tiers(self) -> dict[str, Tier]:
        """Where each adapter lies now: the nearest of the places that have it."""
        with self._lock:
            keys = {name: _key_of(self._known(name)) for name in self.adapters}
            return {name: self._tier_of(key) for name, key in keys.items()}

    def _tier_of(self, key: str) -> Tier:
        if key in self._pool:
            return "device"
        return "host" if key in self._pool.host or key.startswith(_LOCAL) else "bank"

    @property
    def processes(self) -> int:
        """How many processes share the base, and have to make the same calls; mostly 1."""
        return 1 if self._shards is None else self._shards.processes

    @property
    def is_first(self) -> bool:
        """Whether this is the first of them."""
        return self._shards is None or self._shards.is_first

    @property
    def config(self) -> Any:
        """The base's config."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The base's generation config."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the base takes its inputs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's floating-point dtype."""
        return self.model.dtype

    # The batch is set up in eager mode; the base inside is compiled as it stands.
    @torch.compiler.disable(recursive=False)
    def forward(
        self, *args: Any, adapter_ids: AdapterIds = None, alora_offsets: AloraOffsets = None, **kwargs: Any
    ) -> Any:
        """The base's forward, each row through its adapter.

        Args:
            *args: as the base takes them.
            adapter_ids: a name or None for each row; one name for all rows; None for the base alone.
            alora_offsets: as PEFT's, for adapters that act from their invocation tokens on (aLoRA): for each row, how
                many of its last tokens the adapter acts on, or None. Left out, the last occurrence of the tokens in
                `input_ids` decides.
            **kwargs: as the base takes them.

        Raises:
            AdapterIdsError: as many ids as rows are needed; or where an adapter begins to act cannot be seen.
            AdapterNotFoundError: a name that is neither in the bank nor loaded.
        """
        # transformers' tensor parallelism computes otherwise where gradients are wanted, and shows hooks no sums.
        gradients = torch.is_grad_enabled() and self._shards is None
        with torch.set_grad_enabled(gradients), self._batch(adapter_ids, args, kwargs, offsets=alora_offsets):
            return self.model(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_ids: AdapterIds = None, alora_offsets: AloraOffsets = None, **kwargs: Any
    ) -> Any:
        """The base's `generate`, each row through its adapter.

        A row is a prompt: its beams and returned sequences use its adapter. Arguments and errors as in `forward`.
        """
        # As transformers' own `generate`, but already where the batch is formed: kernels pass no gradients.
        with torch.no_grad(), self._batch(adapter_ids, args, kwargs, offsets=alora_offsets, generating=True):
            return self.model.generate(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the base in place, as `nn.Module.compile` does; adapters keep working."""
        self.model.compile(*args, **kwargs)

    def load_adapter(
        self,
        name: str,
        source: Source | None = None,
        *,
        replace: bool = False,
        svd_energy: float | None = None,
        task_id: int | None = None,
    ) -> None:
        """Adds an adapter to the living model, or brings one that it knows to the device ahead of its first use.

        Args:
            name: the name for `adapter_ids`.
            source: a PEFT folder, a Hub id or a live `PeftModel`; it stays in host memory, and the bank on disk is not
                changed (`AdapterBank.add` does that). None: the model's or the bank's adapter of that name.
            replace: take the place of the adapter of that name, if there is one: calls and requests under way keep the
                old one to their end, those that wait get the new one.
            svd_energy: approximate what has no exact low-rank form by SVD, as `lorakit.export` does.
            task_id: the task, of an adapter that has several.

        Raises:
            AdapterExistsError: the name is taken, and `replace` does not say so.
            AdapterNotFoundError: no source, and none in the bank.
            ModelInUseError: several processes share the base, and an engine serves it.
            ConfigError: svd_energy or task_id cannot be, or stand without a source.
            CheckpointError, UnsupportedMethodError, …: as `lorakit.export` raises them; nothing is changed.
        """
        names.check_name(name)
        chosen = Choices(svd_energy, task_id)
        if source is None:
            if chosen != NONE:
                raise ConfigError(f"adapter {name!r} is converted already; svd_energy and task_id need a source.")
            self._check_alone()
            self._bring(name)
            return
        if not replace:
            self._check_free(name)
        self._check_alone()
        form = convert.convert(name, source, self._base, choices=chosen)
        with self._lock:
            if not replace:
                self._check_free(name)  # once more: another thread may have been faster
            invocation = invocation_of(form.method, form.config, name)
            extent = Extent.of_form(form)
            if self._shards is not None:
                extent = self._shards.extent(extent, name)
            if self.has_adapter(name):
                self._forget(name)
            self._local[name] = _Local(f"{_LOCAL}{next(self._keys)}", extent, invocation)

    def know_adapter(
        self, name: str, key: str, reader: ExtentReader, invocation: tuple[int, ...] | None = None
    ) -> None:
        """Serves an adapter that is read when it is first asked for, wherever it lies, in the place of one of its name.

        Where several processes share the base, all of them have to know it before the first is asked for it.

        Args:
            name: the name for `adapter_ids`.
            key: stands for its content: those of one key are one in memory.
            reader: reads it, whole.
            invocation: the tokens from which on it acts, or None if it always does.
        """
        with self._lock:
            if self.has_adapter(name) and _key_of(self._known(name)) != key:
                self._forget(name)
            self._local[name] = _Local(key, reader, invocation)

    def pin_adapter(self, name: str) -> None:
        """Brings an adapter to the device, where it stays: others never take its place until `unpin_adapter`.

        One that comes under its name later stays as well, once it is there.

        Raises:
            AdapterNotFoundError: the model does not serve it.
            PoolFullError: it has no room beside what is pinned or runs; it is not pinned then.
            ModelInUseError: several processes share the base, and an engine serves it.
        """
        with self._lock:
            self._known(name)
            self._check_alone()
            self._pinned.add(name)
        try:
            self._bring(name)
        except BaseException:
            self.unpin_adapter(name)
            raise

    def unpin_adapter(self, name: str) -> None:
        """Lets an adapter make room for others again; nothing happens if it is not pinned.

        Raises:
            AdapterNotFoundError: the model does not serve it.
            ModelInUseError: several processes share the base, and an engine serves it.
        """
        with self._lock:
            key = _key_of(self._known(name))
            self._check_alone()
            self._pinned.discard(name)
            # The same content may have several names.
            if not any(_key_of(self._known(other)) == key for other in self._pinned if self.has_adapter(other)):
                self._pool.unpin(key)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter out of the model and frees its memory; the bank on disk keeps it.

        Raises:
            AdapterNotFoundError: the model does not serve it.
            ModelInUseError: several processes share the base, and an engine serves it.
        """
        with self._lock:
            if name not in self.adapters:
                raise self._unknown(name)
            self._check_alone()
            self._pinned.discard(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        """What is served under a name is no more, wherever it came from."""
        self._last = None
        self._pool.drop(_key_of(self._known(name)))
        self._local.pop(name, None)
        if self.bank is not None and name in self.bank.entries:
            self._unloaded.add(name)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Gives the base to one caller, which serves by `serving`; `forward` and `generate` are refused meanwhile.

        Raises:
            ModelInUseError: it is lent already.
        """
        with self._lock:
            self._check_not_lent()
            self._lent = True
            self._let_join(self._siblings.values())
        try:
            yield
        finally:
            with self._lock:
                self._lent = False
                self._let_join(self._siblings.values())
                self._last = self._asked = None
                self._stands, self._stood, self._standing = {}, set(), {}

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """To be held for whatever is done with `pool`, `adapter` and slots."""
        return self._lock

    @property
    def pool(self) -> AdapterPool:
        """The adapters on the model's device."""
        return self._pool

    def adapter(self, name: str) -> Adapter:
        """An adapter as it is now.

        Raises:
            AdapterNotFoundError: the model does not serve it.
        """
        with self._lock:
            known = self._known(name)
            source = self._source(known)
            added = max((module.added for module in source.layout.modules), default=0)
            return Adapter(name, _key_of(known), source, _invocation_of(name, known), added, name in self._pinned)

    def forget_removed(self) -> None:
        """Frees the memory of what was removed from the bank, or replaced there; unless it changed, costs nothing."""
        if self.bank is None or self.bank.entries is self._followed:
            return
        with self._lock:
            self._followed = self.bank.entries
            served = (entry.blake3 for name, entry in self._followed.items() if name not in self._unloaded)
            self._pool.keep_only({*served, *(local.key for local in self._local.values())})

    @contextmanager
    def serving(self, slots: Sequence[Slot | None], kept: Sequence[int] | None) -> Iterator[None]:
        """Sets the adapters of one forward of the base over single tokens of any rows, and takes them away again.

        Args:
            slots: of each token that the forward is given, in their order; held, and waited for, by the caller.
            kept: the places of the tokens of which it computes logits; None: of all.
        """
        if not any(slots):
            yield
            return
        at_output = slots if kept is None else [slots[place] for place in kept]
        asked = tuple(slots), tuple(at_output)
        if self._asked is None or self._asked.slots != asked:
            rows, fewer = (Rows(some, exact=True) for some in asked)
            self._adapt(rows)
            self._asked = _Asked(asked, self._apart(rows, fewer, frozenset(rows.touched)))
        with self._serving(self._asked.rows):
            yield

    def standing(self, slots: Sequence[Slot | None], *, tokens: int, segments: int) -> Standing | None:
        """The standing batch that serves these slots; None where none can, and `serving` has to.

        Args:
            slots: held by the caller.
            tokens: the most that a forward has.
            segments: the most slots that its tokens have.
        """
        used = {slot for slot in slots if slot is not None}
        if not used or not ops.has_kernels(self.device, self.dtype):
            return None
        with self._lock:
            if not all(slot.layout.key in self._stands for slot in used):
                self._stand({slot.layout for slot in used})
            if not all(self._stands[slot.layout.key] for slot in used):
                return None
            return self._standing_of(Mode.of((slot.dtype, slot.layout) for slot in used), tokens, segments)

    def standings(self, *, tokens: int, segments: int) -> list[Standing]:
        """Standing batches for any one of the adapters that the model serves now, and for all together.

        Args:
            tokens: as in `standing`.
            segments: as in `standing`.
        """
        if not ops.has_kernels(self.device, self.dtype):
            return []
        with self._lock:
            sources = self._sources()
            self._stand({source.layout for source in sources})
            kinds = {
                (self._pool.dtype or source.dtype, source.layout) for source in sources if can_stand(source.layout)
            }
            modes = {Mode.of([kind]) for kind in kinds} | ({Mode.of(kinds)} if kinds else set())
            found = [self._standing_of(mode, tokens, segments) for mode in sorted(modes, key=str)]
            return [standing for standing in found if standing is not None]

    def _standing_of(self, mode: Mode, tokens: int, segments: int) -> Standing | None:
        if mode not in self._standing:
            with plain_tensors():
                self._standing[mode] = self._new_standing(mode, tokens, segments)
        return self._standing[mode]

    @property
    def standing_version(self) -> tuple[int, int, int]:
        """What graphs of standing batches are right for: modules, siblings and tables as they are now."""
        return len(self._stood), len(self._siblings), self._table.version

    @contextmanager
    def standing_by(self, standing: Standing) -> Iterator[None]:
        """Modules ask a standing batch for their adapters' shares, in what runs inside."""
        with ExitStack() as stack:
            for routing in standing.routings:
                stack.enter_context(self._joined(routing))
            yield
            for routing in standing.routings:
                routing.served = True

    def _stand(self, layouts: set[Layout]) -> None:
        """Hooks all modules of these layouts, and of all adapters served now; standing batches are made anew."""
        for layout in layouts | {source.layout for source in self._sources()}:
            self._stands[layout.key] = can_stand(layout)
            if self._stands[layout.key]:
                self._adapt_modules(layout.modules, shared=True)
                self._stood |= {module.path for module in layout.modules}
        self._standing = {}

    def _new_standing(self, mode: Mode, tokens: int, segments: int) -> Standing | None:
        modules = [self._adapted[path] for path in self._stood]
        if not all(module.device == self._pool.device and module.aligned for module in modules):
            return None
        # A table that grew would be another one, and graphs that were captured of no use.
        self._table.reserve(max(_FEWEST_SLOTS, len(self.adapters)), mode.dtypes, sorted(self._stood))
        make = partial(StandingRouting, mode=mode, tokens=tokens, segments=segments, device=self.device)
        heads = self._stood & {self._base.output}
        body = make(sorted(self._stood - heads), self._table, self._finder)
        return Standing(mode, body, make(sorted(heads), self._table, self._finder) if heads else None)

    def _check_alone(self) -> None:
        if self._lent and self.processes > 1:
            raise ModelInUseError(
                "several processes share the base, and an engine serves it; load and unload adapters in all of them "
                "before it starts, or change the bank."
            )

    def _check_not_lent(self) -> None:
        if self._lent:
            raise ModelInUseError(
                "the model is served by an engine; submit requests to the engine, or close it before the model is "
                "called directly."
            )

    @contextmanager
    def _batch(
        self,
        adapter_ids: AdapterIds,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        offsets: AloraOffsets = None,
        generating: bool = False,
    ) -> Iterator[None]:
        """Sets the rows' adapters for what runs inside, and takes them away again whatever happens there."""
        with self._lock, self._set_aside():
            self._check_not_lent()
            ids = self._ids(adapter_ids, args, kwargs)
            starts = self._starts(ids, offsets, args, kwargs, generating=generating)
            slots = self._slots(ids, starts)
            # Of adapters that do not act too: the base has not their tokens.
            layouts = [
                slot.layout if slot is not None else None if name is None else self._source(self._known(name)).layout
                for slot, name in zip(slots, ids, strict=True)
            ]
            first = prompt_of(args, kwargs, generating=generating).first if any(starts) else 0
            check_ids(layouts, starts, first, args, kwargs)
            if not any(slots):
                yield
                return
            with self._pool.hold(slot for slot in slots if slot is not None):
                towers = self._towers(ids, slots, args, kwargs)
                if not any(starts):
                    with self._serving(towers.beside(Rows(together(slots)))):
                        yield
                    return
                activation = Activation(slots, tuple(start or 0 for start in starts))
                # The towers' part stays: `generate` may ask for images ahead of the first forward.
                with self._serving(towers.rows), self._activated(activation, towers.paths, args, kwargs, generating):
                    yield

    @contextmanager
    def _activated(
        self,
        activation: Activation,
        towers: frozenset[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        generating: bool,
    ) -> Iterator[None]:
        """Sets what of the rows' adapters acts in each forward inside, for all modules but the towers'."""

        def serve(forward: Pass) -> AbstractContextManager[None]:
            return self._serving(self._rows_of(activation, forward, towers))

        self._adapt(Rows(activation.slots, exact=True))
        if not generating:
            first = prompt_of(args, kwargs, generating=False).first
            with serve(Pass.of(args, kwargs, first, len(activation.slots))):
                yield
            return
        self._generation = Generation(self.model, activation, serve)
        config = kwargs.get("generation_config") or self.model.generation_config
        early = kwargs.get("assistant_early_exit", getattr(config, "assistant_early_exit", None))
        with self._generation.follow(to_the_end=early is not None):
            yield

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Takes away the batch of a call that is still running: a logits processor may call its own model."""
        outer = [(part, part.batch) for part in self._active]
        active, self._active = self._active, []
        generation = self._generation
        asleep = generation is not None and generation.asleep
        try:
            for part, _ in outer:
                part.batch = None
            if generation is not None:
                generation.asleep = True
            yield
        finally:
            self._active = active
            if self._generation is not generation:
                self._generation = generation
            if generation is not None:
                generation.asleep = asleep
            for part, batch in outer:
                part.batch = batch

    @contextmanager
    def _serving(self, rows: Sequence[Rows]) -> Iterator[None]:
        """Modules ask for their adapters' shares, each by the rows that it is given."""
        rows = [one for one in rows if any(one.slots)]
        active = self._active
        with ExitStack() as stack:
            for batch in self._formed(rows):
                stack.enter_context(
                    self._joined(batch) if isinstance(batch, Routing) else self._attached(batch, batch.paths)
                )
                if batch.added.at_output:
                    stack.enter_context(self._masked(batch))
            try:
                yield
            finally:
                self._active = active

    @contextmanager
    def _attached(self, batch: Batch, paths: Collection[str]) -> Iterator[None]:
        """Modules of these paths ask the batch for their adapters' shares."""
        modules = [self._adapted[path] for path in paths]
        self._active = [*self._active, *modules]
        try:
            for module in modules:
                module.batch = batch
            yield
        finally:
            for module in modules:
                module.batch = None

    @contextmanager
    def _joined(self, batch: Routing) -> Iterator[None]:
        """The same for kernels, which serve siblings together, once it is known who they are."""
        groups = dict.fromkeys(self._siblings[path] for path in batch.paths if path in self._siblings)
        alone = [path for path in batch.paths if path not in self._siblings]
        with plain_tensors():
            batch.write([*(self._adapted[path] for path in alone), *(one for group in groups for one in group.modules)])
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
            found = list(self._finder.found())
            self._siblings |= {module.path: group for group in found for module in group.modules}
            self._let_join(found)

    def _let_join(self, groups: Iterable[Siblings]) -> None:
        """Only in an engine, which promises no bits, may siblings' own products be one launch."""
        joins = self._lent and ops.has_kernels(self.device, self.dtype)
        for group in groups:
            group.joins = joins

    @contextmanager
    def _masked(self, batch: Batch) -> Iterator[None]:
        """Keeps rows from the tokens that other rows' adapters add."""
        self._mask = self._mask or LogitsMask(self.model)
        self._active = [*self._active, self._mask]
        self._mask.batch = batch
        try:
            yield
        finally:
            self._mask.batch = None

    def _towers(
        self, ids: Sequence[str | None], slots: tuple[Slot | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Towers:
        """The towers' modules that adapters touch, where these need rows of their own."""
        if not self._multimodal:
            return Towers()
        rows = Rows(slots)
        paths = tower_paths(self.model, rows.touched)
        for name, slot in zip(ids, slots, strict=True):
            if (
                name is not None
                and slot is not None
                and _invocation_of(name, self._known(name))
                and paths & set(slot.modules)
            ):
                path = min(paths & set(slot.modules))
                raise UnsupportedMethodError(
                    f"adapter {name!r} acts from its invocation tokens on, which {path!r} does not see. Train with "
                    "target_modules that name the language model alone."
                )
        if not paths or len(together(slots)) == 1:
            return Towers()
        self._adapt(rows)
        return towers_of(self.model, paths, slots, _named(self.model, args, kwargs))

    def _rows_of(self, activation: Activation, forward: Pass, towers: frozenset[str]) -> list[Rows]:
        """The rows of a forward in which adapters begin to act; the output's module may see fewer tokens."""
        rows = activation.rows(forward.columns, forward.copies)
        at_output = activation.tokens(forward.kept, forward.copies) if rows.exact else rows
        return self._apart(rows, at_output, frozenset(rows.touched) - towers)

    def _apart(self, rows: Rows, at_output: Rows, touched: frozenset[str]) -> list[Rows]:
        """Rows for all modules of these paths but the output layer, and its own for that."""
        heads = touched & {self._base.output} if rows.exact else frozenset()
        body = rows._replace(paths=touched - heads)
        return [body, at_output._replace(paths=heads)] if heads else [body]

    def _formed(self, rows: Sequence[Rows]) -> tuple[Batch, ...]:
        """The batches of these rows: the last ones if they had the same, else new ones."""
        kernels = ops.has_kernels(self.device, self.dtype) and not torch.is_grad_enabled()
        last, self._last = self._last, None  # what the last batch stacked is freed as more is stacked
        wanted = kernels, self.dtype, list(rows)
        if last is None or (last.kernels, last.dtype, [batch.rows for batch in last.batches]) != wanted:
            if last is not None and last.dtype != self.dtype:
                self._table = AddressTable(self.device, self._adapted)  # an embedding's scale is rounded to its dtype
            # Only in an engine, which promises no bits: how factors lie together may change a product's.
            before = last.factors if last is not None and last.dtype == self.dtype and self._lent else None
            del last
            for one in rows:
                self._adapt(one)
            factors = FactorStacks(torch.promote_types(self.dtype, torch.float32), before)
            with plain_tensors():
                batches = tuple(self._new_batch(one, kernels, factors) for one in rows)
            factors.forget_others()
            last = _Formed(kernels, self.dtype, batches, factors)
        self._last = last
        return last.batches

    def _new_batch(self, rows: Rows, kernels: bool, factors: FactorStacks) -> Batch:
        # Kernels read an adapter where the pool has it, so no module may compute on another device.
        modules = [self._adapted[path] for path in rows.touched]
        if kernels and all(module.device == self._pool.device and module.aligned for module in modules):
            added = AddedTokens(rows, self._adapted)
            return Routing(rows, self._table, self._finder, added, device=self.device)
        return Stacking(rows, self._adapted, factors)

    def _ids(self, adapter_ids: AdapterIds, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, ...]:
        """Checks `adapter_ids` whole: the name of each row, or none at all."""
        if adapter_ids is None:
            return ()
        rows = _count_rows(args, kwargs)
        try:
            ids = [adapter_ids] * rows if isinstance(adapter_ids, str) else list(adapter_ids)
        except TypeError as error:
            message = f"adapter_ids is {adapter_ids!r}; give a name, or one a row (None for the base)."
            raise AdapterIdsError(message) from error
        if len(ids) != rows:
            raise AdapterIdsError(
                f"adapter_ids has {len(ids)} entries for a batch of {rows} rows; give one a row (None for the base)."
            )
        for name in ids:
            if name is not None and not isinstance(name, str):
                raise AdapterIdsError(f"adapter_ids holds {name!r}; an entry is an adapter's name or None.")
        serving = set(self.adapters)
        for name in dict.fromkeys(ids):
            if name is not None and name not in serving:
                raise self._unknown(name)
        return tuple(ids)

    def _starts(
        self,
        ids: Sequence[str | None],
        offsets: AloraOffsets,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        generating: bool,
    ) -> tuple[int | None, ...]:
        """From which of its tokens on each row's adapter acts: 0 for most, None where it never does."""
        found = {name: _invocation_of(name, self._known(name)) for name in dict.fromkeys(ids) if name is not None}
        invocations = {name: tokens for name, tokens in found.items() if tokens is not None}
        if not invocations and offsets is None:
            return (0,) * len(ids)
        prompt = prompt_of(args, kwargs, generating=generating)
        starts = starts_of(ids, invocations, offsets, prompt)
        if generating and kwargs.get("negative_prompt_ids") is not None and any(starts):
            raise AdapterIdsError(
                "negative_prompt_ids have their own tokens, in which adapters that act from their invocation tokens on "
                "(aLoRA) would begin elsewhere; leave them out."
            )
        return tuple(start and start + prompt.first for start in starts)

    def _slots(self, ids: Sequence[str | None], starts: Sequence[int | None]) -> tuple[Slot | None, ...]:
        """Brings every adapter that acts somewhere to the device: the slot of each row."""
        names = [None if start is None else name for name, start in zip(ids, starts, strict=True)]
        self._follow()
        distinct = [name for name in dict.fromkeys(names) if name is not None]
        slots = {name: self._slot(name, keep=distinct) for name in distinct}
        return tuple(None if name is None else slots[name] for name in names)

    def _follow(self) -> None:
        """Goes where the model has gone: what is resident on another device is of no use any more."""
        if self._pool.device != self.device:
            self._last = None
            self._pool = AdapterPool(device=self.device, dtype=self._pool.dtype, capacity=self._pool.capacity)
            self._table = AddressTable(self.device, self._adapted)

    def _bring(self, name: str) -> None:
        """Brings an adapter to the device; the disk is read while others use the model."""
        with self._lock:
            if name not in self._local:
                if self.bank is None or name not in self.bank:
                    raise self._unknown(name)
                self._unloaded.discard(name)
        read: tuple[str, AdapterPool, HostExtent] | None = None
        while True:
            with self._lock:
                self._follow()
                self.forget_removed()
                pool, adapter = self._pool, self.adapter(name)
                if pool.get(adapter.key) is not None:
                    if adapter.pinned:
                        pool.pin(adapter.key)
                    return
                host = pool.host.get(adapter.key)
                if host is None and read is not None and read[:2] == (adapter.key, pool):
                    host = read[2]
                if host is not None:
                    pool.put(adapter.key, host, name=name, pinned=adapter.pinned)
                    return
            with plain_tensors():
                read = adapter.key, pool, pool.host.read(adapter.source, pool.dtype)

    def _slot(self, name: str, keep: Sequence[str]) -> Slot:
        """The adapter's slot, loaded if it is not resident."""
        known = self._known(name)
        key = _key_of(known)
        slot = self._pool.get(key)
        if slot is None:
            self.forget_removed()
            kept = {_key_of(self._known(other)) for other in keep}
            pinned = name in self._pinned
            slot = self._pool.put(key, self._source(known), name=name, keep=kept, pinned=pinned)
        return slot

    def _known(self, name: str) -> _Known:
        """What is served under a name. Asked once for all that belongs together: the bank may change at any time."""
        local = self._local.get(name)
        if local is not None:
            return local
        entry = None if self.bank is None or name in self._unloaded else self.bank.entries.get(name)
        if entry is None:
            raise self._unknown(name)
        return entry

    def _source(self, known: _Known) -> Extent | ExtentReader:
        """Where the pool finds an adapter that the device does not have."""
        reader: ExtentReader
        if isinstance(known, _Local):
            if isinstance(known.extent, Extent):
                return known.extent
            name, reader = known.key, known.extent
        else:
            assert self.bank is not None
            self._compare_base(known)  # it may have come into the bank after the model was made
            name, read = known.name, partial(self._read_into, self.bank, known)
            reader = ExtentReader(known.layout, known.dtype, read)
        return reader if self._shards is None else self._shards.reader(reader, name)

    def _sources(self) -> list[Extent | ExtentReader]:
        """The same of all adapters, but for those that are refused when they are asked for."""
        banked = () if self.bank is None else self.bank.entries.items()
        known: list[_Known] = [
            entry for name, entry in banked if name not in self._unloaded and name not in self._local
        ]
        found = []
        for one in (*known, *self._local.values()):
            with suppress(UnsupportedMethodError):
                found.append(self._source(one))
        return found

    @staticmethod
    def _read_into(bank: AdapterBank, entry: AdapterEntry, buffer: torch.Tensor) -> Extent:
        """Reads an adapter, and no other that came under its name meanwhile."""
        try:
            return bank.read_into(entry, buffer)
        except BankCorruptedError as error:
            now = bank.entries.get(entry.name)
            if now is not None and now.blake3 == entry.blake3:
                raise
            message = f"adapter {entry.name!r} was replaced in the bank while it was read; try again."
            raise AdapterNotFoundError(message) from error

    def _adapt(self, rows: Rows) -> None:
        """Hooks the modules that these rows' adapters touch and that have no hook yet."""
        touched = set(rows.touched)
        modules = [module for slot in rows.used for module in slot.layout.modules if module.path in touched]
        self._adapt_modules(modules, shared=rows.shared)

    def _adapt_modules(self, modules: Iterable[ModuleLayout], *, shared: bool) -> None:
        """The same for modules of layouts.

        Args:
            modules: of any adapters.
            shared: whether adapters act on parts of a module's input.
        """
        kinds: dict[str, Kind] = {}
        for module in modules:
            kinds[module.path] = module.kind
            if module.added and module.kind == "linear" and module.path != self._base.output:
                raise BankError(
                    f"an adapter adds tokens to the vocabulary at {module.path}, which is no output layer: its bank is "
                    "not lorakit's, or is damaged."
                )
        for path, kind in kinds.items():
            owner = path.rpartition(".")[0] if kind in ("experts", "router") else path
            if shared:
                check_placement(self.model, owner)
            if path not in self._adapted:
                found = self.model.get_submodule(owner)
                if kind == "experts":
                    experts = AdaptedExperts(owner, found)
                    self._adapted |= {parameter.path: parameter for parameter in experts.parameters.values()}
                elif kind == "router":
                    self._adapted[path] = AdaptedRouter(path, found)
                else:
                    within = None if self._shards is None else self._shards.partial_sums(path)
                    self._adapted[path] = AdaptedModule(path, found, within)

    def _compare_base(self, entry: AdapterEntry) -> None:
        """Warns of a bank's adapter that was computed from the base's weights as they are not here.

        Once for each way in which a bank's bases were quantised.
        """
        assert self.bank is not None
        name, here = entry.name, self._base.quantisation
        if entry.uses_base_weights and entry.base_quantisation not in {here, *self._warned}:
            self._warned.add(entry.base_quantisation)
            warnings.warn(
                f"adapter {name!r} ({entry.method}) of the bank at {self.bank.path} was computed from the weights of "
                f"the base {in_words(entry.base_quantisation)}, and is served on the base {in_words(here)}; so may "
                "others be. It is not PEFT's adapter exactly, but off by as much as the two bases' weights are apart. "
                "To be exact, export it again with this model as base_model.",
                stacklevel=3,
            )

    def _check_free(self, name: str) -> None:
        if name in self.adapters:
            raise AdapterExistsError(f"the model already serves an adapter {name!r}; unload_adapter({name!r}) first.")

    def _unknown(self, name: object) -> AdapterNotFoundError:
        return names.not_found(name, self.adapters, "the model")


def load_base(base: str | os.PathLike[str], architecture: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a base, in evaluation mode.

    Args:
        base: a folder or a Hub id.
        architecture: its class in transformers, by name.
        **kwargs: for its `from_pretrained`.

    Raises:
        BaseModelNotFoundError: no such base, or transformers lacks the class.
    """
    model_class = architecture_class(architecture)
    try:
        model: PreTrainedModel = model_class.from_pretrained(base, **{"dtype": "auto", **kwargs})
    except (torch.OutOfMemoryError, ImportError, TypeError):
        raise  # the machine's fault, or the call's; not the base's
    except Exception as error:  # a damaged base makes transformers raise nearly anything
        raise BaseModelNotFoundError(
            f"the base model {str(base)!r} cannot be loaded: {error} ({type(error).__name__}). "
            "Check the folder or the Hub id, and download it again if it is damaged."
        ) from error
    return model.eval()


def _key_of(known: _Known) -> str:
    """What an adapter's slot is kept under: its content, so that one replaced under its name is never served."""
    return known.key if isinstance(known, _Local) else known.blake3


def _invocation_of(name: str, known: _Known) -> tuple[int, ...] | None:
    """The tokens from which on an adapter acts, or None for one that always does."""
    return known.invocation if isinstance(known, _Local) else invocation_of(known.method, known.config, name)


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {"input_ids": named.get("inputs"), **named}


def _count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch's rows: the first axis of its first input. A `generate` without inputs starts one row."""
    named = [kwargs[key] for key in _ROW_INPUTS if kwargs.get(key) is not None]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, ModelOutput):
            value = value[0]
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return 1
