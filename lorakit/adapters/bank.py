"""AdapterBank: many adapters of one base model in a folder.

A bank is `bank.json`, the index, and shards `bank-0001.safetensors`, …, in which every adapter lies in one contiguous
byte range. How changes stay whole is `folder.py`'s; this is what a bank's user sees.

Knows adapters by name; knows no PEFT key, no device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lorakit.adapters.damage import WRONG_HASH, Damage, damages
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.files import copy_file
from lorakit.adapters.folder import BankFolder, FixedFolder
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.index import Index
from lorakit.adapters.layout import Extent
from lorakit.adapters.names import check_name, not_found
from lorakit.adapters.packing import blocks, cut
from lorakit.adapters.shard import Progress, ShardFacts, ShardSeries, check_size
from lorakit.adapters.sharing import Sharing
from lorakit.errors import AdapterExistsError, AdapterNameError, BankCorruptedError, BankError, ConfigError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from lorakit.adapters.base import BaseModel
    from lorakit.adapters.peft_reader import Source

_T = TypeVar("_T")

FormItem = tuple[str, AdapterForm | Callable[[], AdapterForm], str]
"""An adapter to add: its name, its form or a function that makes it, and where it comes from."""


@dataclass(frozen=True)
class BankInfo:
    """A bank in numbers.

    Attributes:
        path: its folder.
        base_id: its base model.
        nbytes: the size of all its shards.
        live_nbytes: the bytes of its adapters.
        dead_nbytes: the bytes of removed adapters that `compact` would free.
        shards: the number of shards.
        adapters: its adapters, in the order added.
    """

    path: Path
    base_id: str
    nbytes: int
    live_nbytes: int
    dead_nbytes: int
    shards: int
    adapters: tuple[AdapterEntry, ...]


class AdapterBank(Mapping[str, AdapterEntry]):
    """Many adapters of one base model in a folder; a mapping from their names to what the index says of them.

    Made by `create`, `open` or `from_pretrained`. An open bank shows the index as it was when opened or last written
    through this object; `reload` reads it again.
    """

    def __init__(self, folder: BankFolder) -> None:
        self._folder = folder

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, base_id: str, fingerprint: Mapping[str, Any]) -> AdapterBank:
        """Makes an empty bank.

        Args:
            path: a folder that is empty or not there yet.
            base_id: the base model's id or path.
            fingerprint: JSON facts that tell the base model from others.

        Raises:
            BankError: the folder holds something already, or cannot be written.
        """
        return cls.write(path, (), base_id=base_id, fingerprint=fingerprint)

    @classmethod
    def write(
        cls,
        path: str | os.PathLike[str],
        items: Iterable[FormItem],
        *,
        base_id: str,
        fingerprint: Mapping[str, Any],
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> AdapterBank:
        """Makes a bank that holds these adapters. It appears in one step, as a change by `add_forms` does.

        Args:
            path: a folder that is empty or not there yet.
            items: the adapters, as `add_forms` takes them.
            base_id: the base model's id or path.
            fingerprint: JSON facts that tell the base model from others.
            overwrite: take the place of a bank that is there.
            progress: called for each adapter written.

        Raises:
            BankError: the folder holds something already, or cannot be written.
            AdapterNameError, NonFiniteWeightsError: as `add_forms`.
        """
        index = Index(base_id, json.loads(json.dumps(dict(fingerprint))))
        with BankFolder.founding(Path(path), index, overwrite=overwrite) as folder:
            bank = cls(folder)
            bank._write(folder.index, items, progress=progress)
        return bank

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> AdapterBank:
        """Opens a bank; reads its index only.

        Raises:
            BankError: there is no bank, its index is damaged, or it was written by a newer lorakit.
        """
        return cls(BankFolder.open(Path(path)))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        adapters: Iterable[str] | None = None,
        token: str | bool | None = None,
    ) -> AdapterBank:
        """Opens a bank by its folder, or by its repository on the Hub.

        A repository's bank is kept in huggingface_hub's cache, and opens without a network from then on. It does not
        change, neither here nor by what is pushed later: `copy` gives one that can be changed.

        Args:
            path_or_id: a folder, or a Hub id where no such folder is.
            revision: of a repository: a branch, a tag or a commit; None: main.
            adapters: the only adapters to open; of a repository, only their byte ranges are fetched. Such a bank does
                not change. None: all.
            token: for a private or gated repository; None: the one that `hf auth login` saved, or HF_TOKEN.

        Raises:
            BankError: as `open`; or the repository holds no bank.
            HubError, HubNotFoundError, HubAccessError: the Hub cannot be reached, does not have it, or refuses.
            BankCorruptedError: what the Hub gave is not what the index says.
            AdapterNotFoundError: `adapters` names one that is not there.
            AdapterNameError, ConfigError: `adapters` names one twice, or is no list of names.
        """
        named = str(path_or_id)
        # Only here: opening a folder should not wait for huggingface_hub.
        if isinstance(path_or_id, str) and not Path(named).exists():
            from lorakit.adapters.hub import is_repo_id

            if is_repo_id(named):
                from lorakit.adapters.pull import pull

                return cls(pull(named, revision, adapters, token))
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for a bank on the Hub, and {named!r} is none: leave it out.")
        bank = cls.open(path_or_id)
        if adapters is None:
            return bank
        return cls(FixedFolder(bank.path, bank._folder.index.only(adapters, f"bank {named!r}")))

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._folder.path

    @property
    def base_id(self) -> str:
        """The base model's id or path."""
        return self._folder.index.base_id

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON facts that tell the base model from others, as given to `create`."""
        return self._folder.index.fingerprint

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order added."""
        return list(self._folder.index.adapters)

    @property
    def entries(self) -> Mapping[str, AdapterEntry]:
        """What the index says of all adapters: never changed itself, another object after every change of the bank."""
        return self._folder.index.adapters

    def __len__(self) -> int:
        return len(self._folder.index.adapters)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._folder.index.adapters

    def __getitem__(self, name: str) -> AdapterEntry:
        """What the index says of an adapter.

        Raises:
            AdapterNotFoundError: with the nearest names there are.
        """
        entry = self._folder.index.adapters.get(name)
        if entry is None:
            raise not_found(name, self._folder.index.adapters, f"bank {self._folder.label!r}")
        return entry

    def __repr__(self) -> str:
        return f"AdapterBank({self._folder.label!r}, base_id={self.base_id!r}, adapters={len(self)})"

    def reload(self) -> None:
        """Reads the index again, to see what other processes changed.

        Raises:
            BankError: as `open`.
        """
        self._folder.reload()

    def info(self) -> BankInfo:
        """The bank in numbers, from the index alone."""
        index = self._folder.index
        live = sum(index.live_nbytes().values())
        return BankInfo(
            path=self.path,
            base_id=index.base_id,
            nbytes=sum(shard.nbytes for shard in index.shards.values()),
            live_nbytes=live,
            dead_nbytes=sum(shard.payload_nbytes for shard in index.shards.values()) - live,
            shards=len(index.shards),
            adapters=tuple(index.adapters.values()),
        )

    # Reading

    def read(self, name: str) -> Extent:
        """Reads an adapter's weights into fresh memory, in one go.

        Raises:
            AdapterNotFoundError: no such adapter.
            BankCorruptedError: its shard is missing or too short.
        """
        entry = self[name]
        return Extent.of_bytes(entry.layout, entry.dtype, self._read(entry, entry.nbytes))

    def read_into(self, adapter: str | AdapterEntry, buffer: torch.Tensor) -> Extent:
        """Reads an adapter's weights into memory that is there already, which may be pinned.

        Args:
            adapter: its name; or what the index said of it, so that no other is read that came under its name since.
            buffer: (at least the entry's nbytes,) uint8 on the CPU, contiguous, its first byte at a multiple of 4 in
                its storage.

        Returns:
            Views on the buffer's first nbytes.

        Raises:
            AdapterNotFoundError: no such adapter.
            BankCorruptedError: its shard is missing or too short.
        """
        entry = self[adapter] if isinstance(adapter, str) else adapter
        assert buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous(), "a flat uint8 buffer"
        assert buffer.numel() >= entry.nbytes, f"the buffer has {buffer.numel()} of {entry.nbytes} bytes"
        self._reading(entry, lambda place: self._folder.read_into(place, buffer[: entry.nbytes]))
        return Extent.of_bytes(entry.layout, entry.dtype, buffer)

    def form(self, name: str) -> AdapterForm:
        """Reads an adapter as a form, with its extras; the tensors are views of one fresh buffer.

        Raises:
            AdapterNotFoundError: no such adapter.
            BankCorruptedError: its shard is missing or too short.
        """
        entry = self[name]
        buffer = self._read(entry, entry.stored_nbytes)
        return AdapterForm(
            method=entry.method,
            modules=Extent.of_bytes(entry.layout, entry.dtype, buffer).modules(),
            config=json.loads(json.dumps(entry.config)),
            extras={
                extra.name: buffer[extra.offset : extra.end].view(extra.dtype).view(extra.shape)
                for extra in entry.extras
            },
            uses_base_weights=entry.uses_base_weights,
            base_quantisation=entry.base_quantisation,
            svd_errors=dict(entry.svd_errors),
            task_id=entry.task_id,
        )

    def _read(self, entry: AdapterEntry, nbytes: int) -> torch.Tensor:
        return self._reading(entry, lambda place: self._folder.read(place, nbytes))

    def _reading(self, entry: AdapterEntry, read: Callable[[AdapterEntry], _T]) -> _T:
        """Reads an adapter where it is now: another thread may compact the bank, and delete the shard where it was."""
        try:
            return read(entry)
        except BankCorruptedError as error:
            now = self.entries.get(entry.name)
            if now is None or now.blake3 != entry.blake3 or (now.shard, now.offset) == (entry.shard, entry.offset):
                raise self._damaged(entry, str(error)) from error
        return self._reading(now, read)

    def _damaged(self, entry: AdapterEntry, reason: str) -> BankCorruptedError:
        return BankCorruptedError(
            f"bank {self._folder.label!r}: {Damage(entry.shard, entry.name, reason)}. {self._folder.remedy}"
        )

    def damages(self, names: Iterable[str] | None = None, progress: Progress | None = None) -> list[Damage]:
        """Reads the bank's files and compares them to the index: sizes, headers, hashes, finite weights.

        Args:
            names: the adapters to look at; all by default.
            progress: called for each adapter.

        Returns:
            All that is wrong; empty if nothing is.

        Raises:
            AdapterNotFoundError: no such adapter.
        """
        entries = list(self.values()) if names is None else [self[name] for name in names]
        return damages(self._folder, entries, progress)

    def verify(self, names: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Reads the bank's files and makes sure that they are what the index says (see `damages`).

        Args:
            names: the adapters to look at; all by default.
            progress: called for each adapter.

        Raises:
            AdapterNotFoundError: no such adapter.
            BankCorruptedError: something is wrong; lists all of it.
        """
        found = self.damages(names, progress)
        if found:
            listed = "; ".join(map(str, found[:20])) + (f"; and {len(found) - 20} more" if len(found) > 20 else "")
            raise BankCorruptedError(f"bank {self._folder.label!r} is damaged: {listed}. {self._folder.remedy}")

    # Writing

    def add_forms(
        self,
        items: Iterable[FormItem],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
        shard_bytes: int | None = None,
    ) -> None:
        """Adds adapters, all or none: the bank changes in one step when all are written.

        Pass a list or tuple whose forms are functions, and names are checked before anything is converted or
        written, while one form at a time is in memory. Other iterables are taken as they come.

        Args:
            items: the adapters. A form's tensors must not change until this returns.
            overwrite: replace adapters that are there already; otherwise they are an error.
            progress: called for each adapter written.
            shard_bytes: the size at which a new shard begins; 4 GiB by default.

        Raises:
            AdapterNameError: a name that cannot be, or that comes twice.
            AdapterExistsError: a name that is in the bank already, without `overwrite`.
            NonFiniteWeightsError: a form holds NaN or Inf.
            BankError: the bank's index is damaged, or the folder cannot be written.
        """
        with self._folder.changing() as index:
            self._write(index, items, overwrite=overwrite, progress=progress, shard_bytes=shard_bytes)

    def _write(
        self,
        index: Index,
        items: Iterable[FormItem],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
        shard_bytes: int | None = None,
    ) -> None:
        """Writes adapters into new shards, then the index that names them. Only under the lock."""
        known = [name for name, _, _ in items] if isinstance(items, Sequence) else []
        taken: set[str] = set()
        for name in known:
            _check_new(name, taken, index, overwrite)
        shared = Sharing(index)
        options = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
        with ShardSeries(self.path, index.next_shard, progress=progress, **options) as series:
            for count, (name, form, source) in enumerate(items, start=1):
                if not known:
                    _check_new(name, taken, index, overwrite)
                made = form if isinstance(form, AdapterForm) else form()
                entry = shared.entry(name, made, source)
                longest = max(map(len, known[count:]), default=len(name) if known else len(name) + 8)
                # Of an iterable of unknown length a hundred more are expected: what that wastes is small.
                more = len(known) - count if known else 100
                series.add(entry, blocks(entry, made, series.buffer), more, longest)
            added, shards = series.finish()
            adapters = {**index.adapters, **{entry.name: entry for entry in added}}
            self._folder.replace_index(index.changed(adapters, shards))

    def add(
        self,
        name: str,
        source: Source,
        *,
        base_model: str | os.PathLike[str] | nn.Module | None = None,
        dtype: torch.dtype | None = None,
        svd_energy: float | None = None,
        task_id: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Adds a PEFT checkpoint of the bank's base model; as `add_all` with one."""
        self.add_all(
            {name: source},
            base_model=base_model,
            dtype=dtype,
            svd_energy=svd_energy,
            task_ids=None if task_id is None else {name: task_id},
            overwrite=overwrite,
        )

    def add_all(
        self,
        sources: Mapping[str, Source],
        *,
        base_model: str | os.PathLike[str] | nn.Module | None = None,
        dtype: torch.dtype | None = None,
        svd_energy: float | None = None,
        task_ids: Mapping[str, int] | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Adds PEFT checkpoints of the bank's base model, all or none.

        Args:
            sources: name → a folder that PEFT saved, a Hub id, or a live `peft.PeftModel`.
            base_model: the base as a folder, a Hub id or a live model; None: where the bank says that it is.
            dtype: what A and B are stored in; None: the checkpoint's own.
            svd_energy: approximate what has no exact low-rank form by SVD, as `lorakit.export` does.
            task_ids: name → task, of adapters that have several.
            overwrite: replace adapters of these names.
            progress: called for each adapter written.

        Raises:
            AdapterNameError: a name that cannot be.
            AdapterExistsError: a name that is in the bank already, without `overwrite`.
            BaseModelNotFoundError, BaseModelMismatchError: the base is not there, or is not the bank's.
            CheckpointError, UnsupportedMethodError, …: as `lorakit.export` raises them.
            BankError: the bank's index is damaged, or the folder cannot be written.
        """
        # Only here, as in `export_peft`.
        from lorakit.adapters.choices import choices_of
        from lorakit.adapters.convert import convert
        from lorakit.adapters.peft_reader import describe, reading_ahead

        choices = choices_of(sources, svd_energy, task_ids)
        self.reload()  # another process may have removed what was in the way
        for name in sources:
            _check_new(name, set(), self._folder.index, overwrite)
        base = self._base(base_model)
        with reading_ahead(sources.values()) as ask:

            def make(name: str, source: Source) -> AdapterForm:
                ask()
                return convert(name, source, base, dtype, choices[name], check_finite=False)

            items = [(name, partial(make, name, source), describe(source)) for name, source in sources.items()]
            self.add_forms(items, overwrite=overwrite, progress=progress)

    def merge(
        self,
        name: str,
        weights: Mapping[str, float],
        *,
        combination: str = "cat",
        rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int = 0,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Adds a weighted sum of adapters, as PEFT's `add_weighted_adapter` makes it: a plain LoRA.

        Modules that only some of the adapters have are a sum of those. One adapter alone is multiplied by its weight.

        Args:
            name: of the new adapter.
            weights: adapter → weight, of any sign.
            combination: "linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd",
                "dare_linear_svd", "dare_ties_svd" or "magnitude_prune_svd". "cat" is the sum itself, and its rank the
                sum of the ranks; "svd" is the nearest one of a rank.
            rank: of those that end in "svd"; the largest rank among the adapters by default.
            density: the share of values that pruning keeps, above 0 and at most 1; for all but the first three.
            majority_sign_method: how "ties" elects a sign, "total" or "frequency".
            seed: of the values that "dare" drops.
            dtype: what A and B are stored in; None: float32, in which they are computed.
            overwrite: replace an adapter of this name.

        Raises:
            ConfigError: an argument that cannot be, or ranks that differ where they must be equal.
            AdapterNameError: a name that cannot be.
            AdapterExistsError: a name that is in the bank already, without `overwrite`.
            AdapterNotFoundError: no such adapter.
            UnsupportedMethodError: the sum is no plain LoRA: DoRA, IA³, biases save by "cat".
            NonFiniteWeightsError: the sum has values larger than its dtype holds.
            BankError: the bank is damaged, or the folder cannot be written.
        """
        # Only here, as in `export_peft`.
        from lorakit.adapters.merging import Recipe

        recipe = Recipe(weights, combination, rank, density, majority_sign_method, seed, dtype)

        def merged() -> AdapterForm:
            return recipe.merge(name, {adapter: self.form(adapter) for adapter in weights})

        self.reload()
        _check_new(name, set(), self._folder.index, overwrite)
        recipe.check({adapter: self[adapter] for adapter in weights})
        self.add_forms([(name, merged, str(recipe))], overwrite=overwrite)

    def remove(self, *names: str) -> None:
        """Removes adapters, all or none. Shards that hold no adapter any more are deleted.

        Args:
            names: the adapters. `compact` frees the bytes of those that share a shard with others.

        Raises:
            AdapterNotFoundError: no such adapter.
            BankError: the bank's index is damaged, or the folder cannot be written.
        """
        with self._folder.changing() as index:
            for name in names:
                self[name]
            kept = {name: entry for name, entry in index.adapters.items() if name not in names}
            self._folder.replace_index(index.changed(kept))

    def compact(self, progress: Progress | None = None) -> int:
        """Rewrites the shards that hold removed adapters, without these.

        Args:
            progress: called for each adapter that is moved.

        Returns:
            The freed bytes.

        Raises:
            BankCorruptedError: an adapter that was to be moved is damaged; nothing is changed.
            BankError: the bank's index is damaged, or the folder cannot be written.
        """
        with self._folder.changing() as index:
            _, moved = _by_wholeness(index)
            new, shards = self._rewrite(self.path, index, moved, progress)
            if new:
                adapters = {**index.adapters, **{entry.name: entry for entry in new}}
                self._folder.replace_index(index.changed(adapters, shards))
        return _file_bytes(index.shards) - _file_bytes(self._folder.index.shards)

    def _rewrite(
        self, path: Path, index: Index, moved: Sequence[AdapterEntry], progress: Progress | None
    ) -> tuple[list[AdapterEntry], dict[str, ShardFacts]]:
        """Writes adapters once more, into new shards in a folder; what `ShardSeries.finish` gives."""
        longest = max((len(entry.name) for entry in moved), default=0)
        with ShardSeries(path, index.next_shard, progress=progress) as series:
            for count, entry in enumerate(moved, start=1):
                buffer = self._read(entry, entry.stored_nbytes)
                series.add(entry, cut(buffer), len(moved) - count, longest)
            new, shards = series.finish()
        for entry in new:
            old = index.adapters[entry.name]
            if entry.blake3 != old.blake3:
                raise self._damaged(old, WRONG_HASH)
        return new, shards

    def copy(self, path: str | os.PathLike[str], progress: Progress | None = None) -> AdapterBank:
        """Copies the bank into a folder of its own, where it can be changed. It appears in one step.

        Shards are copied as they are, so that a push knows them again; of those that hold removed adapters, or some
        that this bank does not name, only its own adapters.

        Args:
            path: a folder that is empty or not there yet.
            progress: called for each adapter that is not copied with its whole shard.

        Returns:
            The copy.

        Raises:
            BankCorruptedError: a shard is missing or too short; nothing is left behind.
            BankError: the folder holds something already, or cannot be written.
        """
        index = self._folder.index
        with BankFolder.founding(Path(path), index.changed({})) as folder:
            whole, moved = _by_wholeness(index)
            for shard in whole:
                try:
                    check_size(self.path / shard, index.shards[shard].nbytes)
                except BankCorruptedError as error:
                    damage = Damage(shard, None, str(error))
                    raise BankCorruptedError(f"bank {self._folder.label!r}: {damage}. {self._folder.remedy}") from error
                copy_file(self.path / shard, folder.path / shard)
            new, shards = self._rewrite(folder.path, index, moved, progress)
            adapters = {**index.adapters, **{entry.name: entry for entry in new}}
            folder.replace_index(index.changed(adapters, shards))
        return AdapterBank(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        include_peft: bool | None = None,
        overwrite: bool = False,
        base_model: str | None = None,
        scores: Mapping[str, float | str] | None = None,
    ) -> CommitInfo:
        """Pushes the bank to a repository on the Hub, in one commit, with a model card.

        What the repository holds already is not uploaded again; after an error, push again. Removed adapters are not
        published: the bank is compacted first. Nor are paths of this machine.

        Args:
            repo_id: the repository, as "user/bank"; made if there is none.
            private: whether a new repository is private; None: as its owner's are.
            revision: the branch, made if there is none; None: main.
            commit_message: the commit's first line.
            token: None: the one that `hf auth login` saved, or HF_TOKEN.
            create_pr: open a pull request with the commit.
            include_peft: also an `adapters/NAME` for each adapter, which PEFT reads as its `subfolder`. None: if the
                repository has them.
            overwrite: take away adapters that are there and not in this bank, or replace a bank of another base.
            base_model: the base's Hub id, for the card and for who pulls the bank; None: the bank's own `base_id`, if
                the Hub knows it.
            scores: name → a score, for the card.

        Returns:
            The commit, as huggingface_hub tells of it; the last one if there was nothing to push.

        Raises:
            HubError, HubNotFoundError, HubAccessError: the Hub cannot be reached or refuses.
            AdapterExistsError: adapters are there that this bank lacks, without `overwrite`.
            BaseModelMismatchError: a bank of another base is there, without `overwrite`; or as `export_peft`.
            ConfigError: repo_id or base_model is no id.
            AdapterNotFoundError: `scores` names an adapter that is not there.
            BankError: the bank cannot be read or compacted, or the repository's card has metadata that cannot be read.
        """
        # Only here, as in `from_pretrained`.
        from lorakit.adapters.push import Target, push

        target = Target(
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            token=token,
            create_pr=create_pr,
            include_peft=include_peft,
            overwrite=overwrite,
            base_model=base_model,
            scores=scores,
        )
        return push(self, self._folder, target)

    def export_peft(
        self,
        name: str,
        out_dir: str | os.PathLike[str],
        *,
        base_model: str | os.PathLike[str] | nn.Module | None = None,
    ) -> Path:
        """Writes an adapter as a PEFT checkpoint, which appears whole or not at all.

        Args:
            name: the adapter.
            out_dir: a folder that is empty or not there yet.
            base_model: its base, which only an adapter that adds tokens to the vocabulary needs; None: the one that
                the bank names.

        Returns:
            The folder.

        Raises:
            AdapterNotFoundError: no such adapter.
            BankCorruptedError: its shard is missing or too short.
            BankError: out_dir is not empty or cannot be written.
            BaseModelNotFoundError, BaseModelMismatchError: the base is needed, and is not there or is not the bank's.
        """
        # Only here: it imports PEFT, which takes seconds, and opening a bank should not wait for that.
        from lorakit.adapters.peft_writer import write_checkpoint

        out = Path(out_dir)
        self[name]
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BankError(f"{str(out)!r} is there already and not empty: choose another folder, or delete it.")
        write_checkpoint(self.form(name), out, partial(self._base, base_model))
        return out

    def _base(self, base_model: str | os.PathLike[str] | nn.Module | None) -> BaseModel:
        """The bank's base, checked."""
        # Only here, as in `export_peft`.
        from lorakit.adapters import fingerprint
        from lorakit.adapters.base import BaseModel

        architecture = str(self.fingerprint.get("architecture") or "") or None
        base = BaseModel.of(self.base_id if base_model is None else base_model, architecture=architecture)
        fingerprint.check(base, self.fingerprint, owner=f"the bank {self._folder.label!r}")
        return base


def _by_wholeness(index: Index) -> tuple[list[str], list[AdapterEntry]]:
    """The shards that hold nothing but the index's adapters; and the adapters of the others, as they lie."""
    live = index.live_nbytes()
    whole = [name for name, facts in index.shards.items() if live[name] == facts.payload_nbytes]
    others = [entry for entry in index.adapters.values() if entry.shard not in whole]
    return whole, sorted(others, key=lambda entry: (entry.shard, entry.offset))


def _check_new(name: str, taken: set[str], index: Index | None, overwrite: bool) -> None:
    """Checks one more name of a batch."""
    check_name(name)
    if name in taken:
        raise AdapterNameError(f"adapter {name!r} comes twice: give each adapter a name of its own.")
    taken.add(name)
    if index is not None and name in index.adapters and not overwrite:
        raise AdapterExistsError(
            f"adapter {name!r} is in the bank already: choose another name, or pass overwrite=True to replace it."
        )


def _file_bytes(shards: Mapping[str, ShardFacts]) -> int:
    return sum(shard.nbytes for shard in shards.values())
