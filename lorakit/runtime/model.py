"""MultiLoraModel: one base model, and in every batch any mix of adapters.

`forward` and `generate` are the base's own with one more argument, `adapter_ids`: an adapter's name for each row, or
None for the base. Only public API of transformers is used. Knows names and modules; no request, no text.
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lorakit.adapters import convert, fingerprint, names
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel, architecture_class
from lorakit.adapters.choices import NONE, Choices
from lorakit.adapters.layout import Extent
from lorakit.adapters.peft_reader import Source
from lorakit.adapters.quantised import in_words
from lorakit.errors import (
    AdapterExistsError,
    AdapterIdsError,
    AdapterNotFoundError,
    BankError,
    BaseModelMismatchError,
    BaseModelNotFoundError,
    ConfigError,
)
from lorakit.runtime import ops
from lorakit.runtime.host_cache import ExtentReader
from lorakit.runtime.layers import AdaptedModule, Batch
from lorakit.runtime.placement import check_placement
from lorakit.runtime.pool import AdapterPool, Slot, plain_tensors
from lorakit.runtime.routing import Routing
from lorakit.runtime.siblings import SiblingFinder, Siblings
from lorakit.runtime.stacking import Stacking
from lorakit.runtime.table import AddressTable
from lorakit.runtime.vocabulary import AddedTokens, LogitsMask

AdapterIds: TypeAlias = str | Sequence[str | None] | None

# Where a batch's rows are counted, in this order; whatever else is a tensor comes after.
_ROW_INPUTS = ("input_ids", "inputs", "inputs_embeds", "encoder_outputs", "decoder_input_ids", "attention_mask")


class _Formed(NamedTuple):
    """A batch that was formed, whether kernels were asked for, and the base's dtype then."""

    kernels: bool
    dtype: torch.dtype
    batch: Batch


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
            bank: an open bank or its folder; its adapters are loaded to the device when first used.
            adapter_dtype: dtype of A and B on the device. None: as stored, which gives PEFT's outputs; where PEFT
                saved fp32 (its default), the dtype of a 16-bit base halves their bytes and rounds them.
            adapter_memory: bytes that resident adapters may take on the device; None: no limit. When it is full, the
                least recently used make room. The factors of the batch at hand are stacked beside it, in fp32.

        Raises:
            BankError: the folder holds no bank.
            BaseModelMismatchError: the bank was made for another base, or the model is one that PEFT has wrapped.
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
        self._base = BaseModel.of(model)
        if bank is not None:
            fingerprint.check(self._base, bank.fingerprint, owner=f"the bank at {bank.path}")
        self.model = model
        self.bank = bank
        self._lock = threading.RLock()
        self._adapted: dict[str, AdaptedModule] = {}
        self._local: dict[str, tuple[str, Extent]] = {}
        self._unloaded: set[str] = set()
        self._keys = itertools.count()
        self._pool = AdapterPool(device=self.device, dtype=adapter_dtype, capacity=adapter_memory)
        self._last: _Formed | None = None
        self._active: list[AdaptedModule | Siblings | LogitsMask] = []
        self._mask: LogitsMask | None = None
        self._finder = SiblingFinder()
        self._siblings: dict[str, Siblings] = {}
        self._table = AddressTable(self.device, self._adapted)
        self._warned: set[str] = set()
        for name in self.adapters:
            self._compare_base(name)

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
            bank: an open bank or its folder.
            adapter_dtype: see `MultiLoraModel`.
            adapter_memory: see `MultiLoraModel`.
            **kwargs: for the base's own `from_pretrained` (dtype, device_map, quantization_config, …).

        Raises:
            BaseModelNotFoundError: no such base, or transformers lacks the class that the bank was made for.
        """
        bank = bank if isinstance(bank, AdapterBank) else AdapterBank.from_pretrained(bank)
        model_class = architecture_class(str(bank.fingerprint.get("architecture")))
        try:
            model = model_class.from_pretrained(base, **{"dtype": "auto", **kwargs})
        except (torch.OutOfMemoryError, ImportError, TypeError):
            raise  # the machine's fault, or the call's; not the base's
        except Exception as error:  # a damaged base makes transformers raise nearly anything
            raise BaseModelNotFoundError(
                f"the base model {str(base)!r} cannot be loaded: {error} ({type(error).__name__}). "
                "Check the folder or the Hub id, and download it again if it is damaged."
            ) from error
        return cls(model.eval(), bank, adapter_dtype=adapter_dtype, adapter_memory=adapter_memory)

    @property
    def adapters(self) -> list[str]:
        """Names that `adapter_ids` may hold: the bank's and those loaded into this model."""
        banked = () if self.bank is None else self.bank.names
        return [*(name for name in banked if name not in self._unloaded and name not in self._local), *self._local]

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
    def forward(self, *args: Any, adapter_ids: AdapterIds = None, **kwargs: Any) -> Any:
        """The base's forward, each row through its adapter.

        Args:
            *args: as the base takes them.
            adapter_ids: a name or None for each row; one name for all rows; None for the base alone.
            **kwargs: as the base takes them.

        Raises:
            AdapterIdsError: as many ids as rows are needed.
            AdapterNotFoundError: a name that is neither in the bank nor loaded.
        """
        with self._batch(adapter_ids, args, kwargs):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_ids: AdapterIds = None, **kwargs: Any) -> Any:
        """The base's `generate`, each row through its adapter.

        A row is a prompt: its beams and returned sequences use its adapter. Arguments and errors as in `forward`.
        """
        # As transformers' own `generate`, but already where the batch is formed: kernels pass no gradients.
        with torch.no_grad(), self._batch(adapter_ids, args, kwargs):
            return self.model.generate(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the base in place, as `nn.Module.compile` does; adapters keep working."""
        self.model.compile(*args, **kwargs)

    def load_adapter(
        self,
        name: str,
        source: Source | None = None,
        *,
        svd_energy: float | None = None,
        task_id: int | None = None,
    ) -> None:
        """Adds an adapter to the living model, or brings one that it knows to the device ahead of its first use.

        Args:
            name: the name for `adapter_ids`.
            source: a PEFT folder, a Hub id or a live `PeftModel`; it stays in host memory, and the bank on disk is not
                changed (`AdapterBank.add` does that). None: the model's or the bank's adapter of that name.
            svd_energy: approximate what has no exact low-rank form by SVD, as `lorakit.export` does.
            task_id: the task, of an adapter that has several.

        Raises:
            AdapterExistsError: the name is taken.
            AdapterNotFoundError: no source, and none in the bank.
            ConfigError: svd_energy or task_id cannot be, or stand without a source.
            CheckpointError, UnsupportedMethodError, …: as `lorakit.export` raises them; nothing is changed.
        """
        names.check_name(name)
        chosen = Choices(svd_energy, task_id)
        if source is None:
            if chosen != NONE:
                raise ConfigError(f"adapter {name!r} is converted already; svd_energy and task_id need a source.")
            with self._lock:
                if name not in self._local:
                    if self.bank is None or name not in self.bank:
                        raise self._unknown(name)
                    self._unloaded.discard(name)
                self._follow()
                self._slot(name, keep=())
            return
        self._check_free(name)
        form = convert.convert(name, source, self._base, choices=chosen)
        with self._lock:
            self._check_free(name)  # once more: another thread may have been faster
            self._local[name] = f"local-{next(self._keys)}", Extent.of_form(form)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter out of the model and frees its memory; the bank on disk keeps it.

        Raises:
            AdapterNotFoundError: the model does not serve it.
        """
        with self._lock:
            if name not in self.adapters:
                raise self._unknown(name)
            self._last = None
            self._pool.drop(self._key(name))
            if self._local.pop(name, None) is None:
                self._unloaded.add(name)

    @contextmanager
    def _batch(self, adapter_ids: AdapterIds, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Sets the rows' adapters for what runs inside, and takes them away again whatever happens there."""
        with self._lock, self._set_aside():
            slots = self._slots(adapter_ids, args, kwargs)
            if not any(slots):
                yield
                return
            with self._pool.hold(slot for slot in slots if slot is not None):
                batch = self._formed(slots)
                if batch.added:
                    batch.added.check(args, kwargs)
                with (
                    self._joined(batch) if isinstance(batch, Routing) else self._attached(batch, batch.paths),
                    self._masked(batch),
                ):
                    yield

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
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
        self._active = [*groups]
        try:
            for group in groups:
                group.batch = batch
            with self._attached(batch, alone):
                yield
        finally:
            for group in groups:
                group.batch = None
                group.forget()
            for group in self._finder.found():
                self._siblings |= {module.path: group for module in group.modules}

    @contextmanager
    def _masked(self, batch: Batch) -> Iterator[None]:
        """Keeps rows from the tokens that other rows' adapters add."""
        if not batch.added:
            yield
            return
        self._mask = self._mask or LogitsMask(self.model)
        self._active = [*self._active, self._mask]
        self._mask.batch = batch
        try:
            yield
        finally:
            self._mask.batch = None

    def _formed(self, slots: tuple[Slot | None, ...]) -> Batch:
        """The batch of these slots: the last one if it had the same, else a new one."""
        kernels = ops.has_kernels(self.device, self.dtype) and not torch.is_grad_enabled()
        last, self._last = self._last, None  # what the last batch stacked is free before more is stacked
        if last is None or (last.kernels, last.dtype) != (kernels, self.dtype) or last.batch.slots != slots:
            if last is not None and last.dtype != self.dtype:
                self._table = AddressTable(self.device, self._adapted)  # an embedding's scale is rounded to its dtype
            del last
            self._adapt(slots)
            with plain_tensors():
                last = _Formed(kernels, self.dtype, self._new_batch(slots, kernels))
        self._last = last
        return last.batch

    def _new_batch(self, slots: tuple[Slot | None, ...], kernels: bool) -> Batch:
        paths = {path for slot in slots if slot is not None for path in slot.modules}
        # Kernels read an adapter where the pool has it, so no module may compute on another device.
        if kernels and all(self._adapted[path].device == self._pool.device for path in paths):
            return Routing(slots, self._table, self._finder, AddedTokens(slots, self._adapted), device=self.device)
        return Stacking(slots, self._adapted, dtype=torch.promote_types(self.dtype, torch.float32))

    def _slots(self, adapter_ids: AdapterIds, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Slot | None, ...]:
        """Checks `adapter_ids` whole, then brings every adapter it names to the device."""
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
        self._follow()
        distinct = [name for name in dict.fromkeys(ids) if name is not None]
        slots = {name: self._slot(name, keep=distinct) for name in distinct}
        if len(set(ids)) == 1 and distinct:
            return (slots[distinct[0]],)  # one adapter for all: whatever the model does with rows, it is right
        return tuple(None if name is None else slots[name] for name in ids)

    def _follow(self) -> None:
        """Goes where the model has gone: what is resident on another device is of no use any more."""
        if self._pool.device != self.device:
            self._last = None
            self._pool = AdapterPool(device=self.device, dtype=self._pool.dtype, capacity=self._pool.capacity)
            self._table = AddressTable(self.device, self._adapted)

    def _slot(self, name: str, keep: Sequence[str]) -> Slot:
        """The adapter's slot, loaded if it is not resident."""
        key = self._key(name)
        slot = self._pool.get(key)
        if slot is None:
            # What was removed from the bank, or replaced there under its name, is not served any more.
            self._pool.keep_only({self._key(other) for other in self.adapters})
            slot = self._pool.put(key, self._stored(name), name=name, keep={self._key(other) for other in keep})
        return slot

    def _stored(self, name: str) -> Extent | ExtentReader:
        """Where the pool finds an adapter that the device does not have."""
        if name in self._local:
            return self._local[name][1]
        assert self.bank is not None
        self._compare_base(name)  # it may have come into the bank after the model was made
        entry = self.bank[name]
        return ExtentReader(entry.layout, entry.dtype, partial(self.bank.read_into, name))

    def _key(self, name: str) -> str:
        """What an adapter's slot is kept under: its content, so that one replaced under its name is never served."""
        if name in self._local:
            return self._local[name][0]
        assert self.bank is not None
        return self.bank[name].blake3

    def _adapt(self, slots: Sequence[Slot | None]) -> None:
        """Hooks the modules that these adapters touch and that have no hook yet."""
        for slot in filter(None, slots):
            for module in slot.layout.modules:
                if module.added and module.kind == "linear" and module.path != self._base.output:
                    raise BankError(
                        f"an adapter adds tokens to the vocabulary at {module.path}, which is no output layer: its "
                        "bank is not lorakit's, or is damaged."
                    )
        for path in dict.fromkeys(path for slot in slots if slot is not None for path in slot.modules):
            if len(slots) > 1:
                check_placement(self.model, path)
            if path not in self._adapted:
                self._adapted[path] = AdaptedModule(path, self.model.get_submodule(path))

    def _compare_base(self, name: str) -> None:
        """Warns of a bank's adapter that was computed from the base's weights as they are not here.

        Once for each way in which a bank's bases were quantised.
        """
        assert self.bank is not None
        entry, here = self.bank[name], self._base.quantisation
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


def _count_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch's rows: the first axis of its first input. A `generate` without inputs starts one row."""
    named = [kwargs[key] for key in _ROW_INPUTS if kwargs.get(key) is not None]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, ModelOutput):
            value = value[0]
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return 1
