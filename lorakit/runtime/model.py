"""MultiLoraModel: one base model, and in every batch any mix of adapters.

`forward` and `generate` are the base's own with one more argument, `adapter_ids`: an adapter's name for each row, or
None for the base. Only public API of transformers is used. Knows names and modules; no request, no text.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters import convert, fingerprint, names
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.adapters.choices import NONE, Choices
from lorakit.adapters.layout import Layout
from lorakit.adapters.peft_reader import Source
from lorakit.errors import (
    AdapterIdsError,
    BaseModelMismatchError,
    ConfigError,
    ModelInUseError,
    UnsupportedMethodError,
)
from lorakit.runtime import ops
from lorakit.runtime.activation import Activation, Generation, Pass
from lorakit.runtime.adapted_base import AdaptedBase
from lorakit.runtime.call import AdapterIds, AloraOffsets, ids_of, named
from lorakit.runtime.host_cache import ExtentReader, HostExtent
from lorakit.runtime.loading import load_base
from lorakit.runtime.pool import AdapterPool, Slot, plain_tensors
from lorakit.runtime.prompts import prompt_of, starts_of
from lorakit.runtime.roster import Adapter, Local, Roster, activation_of, is_local, key_of
from lorakit.runtime.rows import Rows, together
from lorakit.runtime.sharding import Shards
from lorakit.runtime.standing import Standing
from lorakit.runtime.standings import Standings
from lorakit.runtime.towers import Towers, has_towers, tower_paths, towers_of
from lorakit.runtime.vocabulary import check_ids


class _Asked(NamedTuple):
    """What `serving` was asked for last: the slots of all tokens, those at the output, and the rows that these make."""

    slots: tuple[tuple[Slot | None, ...], tuple[Slot | None, ...]]
    rows: list[Rows]


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
        self._roster = Roster(self._base, bank, self._shards)
        self._pool = AdapterPool(device=self.device, dtype=adapter_dtype, capacity=adapter_memory)
        self._adapted = AdaptedBase(model, self._base.output, self._shards)
        self._standings = Standings(self._adapted, self._roster, self._base.output)
        self._asked: _Asked | None = None
        self._generation: Generation | None = None
        self._multimodal = has_towers(model)
        self._lent = False

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
        return self._roster.names

    def has_adapter(self, name: str) -> bool:
        """Whether `adapter_ids` may hold a name; however many there are, it takes no time."""
        return name in self._roster

    @property
    def pinned(self) -> frozenset[str]:
        """Names of adapters that stay on the device."""
        return self._roster.pinned

    def tiers(self) -> dict[str, Tier]:
        """Where each adapter lies now: the nearest of the places that have it."""
        with self._lock:
            keys = {name: key_of(self._roster.known(name)) for name in self.adapters}
            return {name: self._tier_of(key) for name, key in keys.items()}

    def _tier_of(self, key: str) -> Tier:
        if key in self._pool:
            return "device"
        return "host" if key in self._pool.host or is_local(key) else "bank"

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
            ModelInUseError: several processes share the base, and an engine serves it: a source cannot be loaded then,
                and all else is the first process's.
            ConfigError: svd_energy or task_id cannot be, or stand without a source.
            CheckpointError, UnsupportedMethodError, …: as `lorakit.export` raises them; nothing is changed.
        """
        names.check_name(name)
        chosen = Choices(svd_energy, task_id)
        if source is None:
            if chosen != NONE:
                raise ConfigError(f"adapter {name!r} is converted already; svd_energy and task_id need a source.")
            self._check_first()
            self._bring(name)
            return
        if not replace:
            self._roster.check_free(name)
        self._check_alone()
        form = convert.convert(name, source, self._base, choices=chosen)
        with self._lock:
            if not replace:
                self._roster.check_free(name)  # once more: another thread may have been faster
            local = self._roster.in_memory(name, form)
            if name in self._roster:
                self._forget(name)
            self._roster.add(name, local)

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
            # What other processes have in memory goes when the first one lets go of it.
            if name in self._roster and key_of(self._roster.known(name)) != key and self._is_leading:
                self._forget(name)
            self._roster.add(name, Local(key, reader, invocation))

    def pin_adapter(self, name: str) -> None:
        """Brings an adapter to the device, where it stays: others never take its place until `unpin_adapter`.

        One that comes under its name later stays as well, once it is there.

        Raises:
            AdapterNotFoundError: the model does not serve it.
            PoolFullError: it has no room beside what is pinned or runs; it is not pinned then.
            ModelInUseError: several processes share the base, an engine serves it, and this is not the first of them.
        """
        with self._lock:
            self._roster.known(name)
            self._check_first()
            self._roster.pin(name)
        try:
            self._bring(name)
        except BaseException:
            self.unpin_adapter(name)
            raise

    def unpin_adapter(self, name: str) -> None:
        """Lets an adapter make room for others again; nothing happens if it is not pinned.

        Raises:
            AdapterNotFoundError: the model does not serve it.
            ModelInUseError: several processes share the base, an engine serves it, and this is not the first of them.
        """
        with self._lock:
            known = self._roster.known(name)
            self._check_first()
            self._roster.unpin(name)
            # The same content may have several names.
            if not self._roster.is_pinned(known):
                self._pool.unpin(key_of(known))

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter out of the model and frees its memory; the bank on disk keeps it.

        Raises:
            AdapterNotFoundError: the model does not serve it.
            ModelInUseError: several processes share the base, an engine serves it, and this is not the first of them.
        """
        with self._lock:
            self._roster.known(name)
            self._check_first()
            self._roster.unpin(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        """What is served under a name is no more, wherever it came from."""
        self._adapted.last = None
        self._pool.drop(key_of(self._roster.known(name)))
        self._roster.remove(name)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Gives the base to one caller, which serves by `serving`; `forward` and `generate` are refused meanwhile.

        Raises:
            ModelInUseError: it is lent already.
        """
        with self._lock:
            self._check_not_lent()
            self._lent = True
            self._adapted.keep_bits(False)
        try:
            yield
        finally:
            with self._lock:
                self._lent = False
                self._adapted.keep_bits(True)
                self._adapted.last = self._asked = None
                self._standings.clear()

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
            return self._roster.adapter(name)

    def forget_removed(self) -> None:
        """Frees the memory of what was removed from the bank, or replaced there; unless it changed, costs nothing."""
        if self._roster.is_behind:
            with self._lock:
                self._pool.keep_only(self._roster.follow())

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
            self._adapted.adapt(rows)
            self._asked = _Asked(asked, self._adapted.apart(rows, fewer, frozenset(rows.touched)))
        with self._adapted.serving(self._asked.rows):
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
            return self._standings.of(used, tokens=tokens, segments=segments)

    def standings(self, *, tokens: int, segments: int) -> list[Standing]:
        """Standing batches for any one of the adapters that the model serves now; the last is for all together, too.

        Args:
            tokens: as in `standing`.
            segments: as in `standing`.
        """
        if not ops.has_kernels(self.device, self.dtype):
            return []
        with self._lock:
            return self._standings.of_each(self._pool.dtype, tokens=tokens, segments=segments)

    @property
    def standing_version(self) -> tuple[int, int, int]:
        """What graphs of standing batches are right for: modules, siblings and tables as they are now."""
        return self._standings.version

    def standing_by(self, standing: Standing) -> AbstractContextManager[None]:
        """Modules ask a standing batch for their adapters' shares, in what runs inside."""
        return self._standings.asked(standing)

    @property
    def _is_leading(self) -> bool:
        """Whether this process decides what is in memory; an engine's other processes do what its first one does."""
        return self.is_first or not self._lent

    def _check_first(self) -> None:
        if not self._is_leading:
            raise ModelInUseError(
                "several processes share the base, and an engine serves it: pin, load and unload adapters in the first."
            )

    def _check_alone(self) -> None:
        if self._lent and self.processes > 1:
            raise ModelInUseError(
                "several processes share the base, and an engine serves it; load an adapter from its source in all of "
                "them before it starts, or add it to the bank."
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
            ids = ids_of(adapter_ids, args, kwargs)
            self._roster.check_known(ids)
            starts = self._starts(ids, offsets, args, kwargs, generating=generating)
            slots = self._slots(ids, starts)
            # Of adapters that do not act too: the base has not their tokens.
            layouts = [
                slot.layout if slot is not None else None if name is None else self._layout_of(name)
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
                    with self._adapted.serving(towers.beside(Rows(together(slots)))):
                        yield
                    return
                activation = Activation(slots, tuple(start or 0 for start in starts))
                # The towers' part stays: `generate` may ask for images ahead of the first forward.
                with (
                    self._adapted.serving(towers.rows),
                    self._activated(activation, towers.paths, args, kwargs, generating),
                ):
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
            return self._adapted.serving(self._rows_of(activation, forward, towers))

        self._adapted.adapt(Rows(activation.slots, exact=True))
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
        generation = self._generation
        asleep = generation is not None and generation.asleep
        with self._adapted.set_aside():
            try:
                if generation is not None:
                    generation.asleep = True
                yield
            finally:
                self._generation = generation
                if generation is not None:
                    generation.asleep = asleep

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
                and activation_of(name, self._roster.known(name))
                and paths & set(slot.modules)
            ):
                path = min(paths & set(slot.modules))
                raise UnsupportedMethodError(
                    f"adapter {name!r} acts from its invocation tokens on, which {path!r} does not see. Train with "
                    "target_modules that name the language model alone."
                )
        if not paths or len(together(slots)) == 1:
            return Towers()
        self._adapted.adapt(rows)
        return towers_of(self.model, paths, slots, named(self.model, args, kwargs))

    def _rows_of(self, activation: Activation, forward: Pass, towers: frozenset[str]) -> list[Rows]:
        """The rows of a forward in which adapters begin to act; the output's module may see fewer tokens."""
        rows = activation.rows(forward.columns, forward.copies)
        at_output = activation.tokens(forward.kept, forward.copies) if rows.exact else rows
        return self._adapted.apart(rows, at_output, frozenset(rows.touched) - towers)

    def _layout_of(self, name: str) -> Layout:
        return self._roster.source(self._roster.known(name)).layout

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
        found = {name: activation_of(name, self._roster.known(name)) for name in dict.fromkeys(ids) if name is not None}
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
            self._pool = AdapterPool(device=self.device, dtype=self._pool.dtype, capacity=self._pool.capacity)
            self._adapted.follow()

    def _bring(self, name: str) -> None:
        """Brings an adapter to the device; the disk is read while others use the model."""
        with self._lock:
            self._roster.restore(name)
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
        known = self._roster.known(name)
        key = key_of(known)
        slot = self._pool.get(key)
        if slot is None:
            self.forget_removed()
            kept = {key_of(self._roster.known(other)) for other in keep}
            pinned = name in self._roster.pinned
            slot = self._pool.put(key, self._roster.source(known), name=name, keep=kept, pinned=pinned)
        return slot
