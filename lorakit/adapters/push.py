"""A bank here → a repository on the Hub, in one commit.

Shards are uploaded first, by huggingface_hub, which leaves out what the repository holds; then one commit brings the
index, the card and the shards that the index names, and takes away those that it no longer names. So every commit is a
whole bank, and what a broken connection leaves behind is no part of any.

Knows files and facts; knows no tensor's meaning.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.folder import INDEX_NAME, BankFolder, FixedFolder
from lorakit.adapters.hub import CLIENT_ERRORS, asking, is_repo_id, library, translated
from lorakit.adapters.index import Index
from lorakit.adapters.model_card import Facts, write_card
from lorakit.adapters.names import not_found
from lorakit.adapters.shard import shard_number
from lorakit.errors import AdapterExistsError, BankError, BaseModelMismatchError, ConfigError, HubError

if TYPE_CHECKING:
    from lorakit.adapters.bank import AdapterBank

CARD = "README.md"
PEFT_FOLDER = "adapters"
"""In the repository, it holds a PEFT folder an adapter."""

_logger = logging.getLogger(__name__)
_BASE_KEY = "base_model_name_or_path"
# huggingface_hub tells of a failed upload by a plain RuntimeError, of what a server refused perhaps by a ValueError.
_UPLOAD_ERRORS: tuple[type[Exception], ...] = (RuntimeError, ValueError, *CLIENT_ERRORS)
_TRIES = 3  # to push a bank that other processes change meanwhile


@dataclass(frozen=True)
class Target:
    """Where a bank is pushed, and how.

    Attributes:
        repo_id: the repository; made if there is none.
        private: whether a new repository is private; None: by the namespace's default.
        revision: a branch, made if there is none; None: main.
        commit_message: the commit's first line.
        token: as huggingface_hub takes it.
        create_pr: open a pull request instead of changing the branch.
        include_peft: whether it holds PEFT folders; None: if it does already.
        overwrite: take adapters away that are there and not in the bank.
        base_model: the base's Hub id; None: as the bank names it, if the Hub knows that.
        scores: name → what is known of an adapter's quality, for the card.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    token: str | bool | None = None
    create_pr: bool = False
    include_peft: bool | None = None
    overwrite: bool = False
    base_model: str | None = None
    scores: Mapping[str, float | str] | None = None


def push(bank: AdapterBank, folder: BankFolder, target: Target) -> CommitInfo:
    """Pushes a bank; see `AdapterBank.push_to_hub`.

    Args:
        bank: the bank.
        folder: its files.
        target: where it is pushed, and how.
    """
    if not is_repo_id(target.repo_id):
        raise ConfigError(f"{target.repo_id!r} is no repository's id; write it as 'user/bank'.")
    if target.base_model is not None and not is_repo_id(target.base_model):
        raise ConfigError(f"base_model={target.base_model!r} is no Hub id; write it as 'org/base', or leave it out.")
    folder.reload()
    for name in target.scores or {}:
        if name not in bank:
            raise not_found(name, bank, f"bank {folder.label!r}")
    for _ in range(_TRIES):
        if bank.info().dead_nbytes:
            bank.compact()  # what was removed must not be published
        index = folder.index
        try:
            return _Push(type(bank), folder.path, index, target).run()
        except (BankError, HubError):
            if all((folder.path / shard).is_file() for shard in index.shards):
                raise
            # Another process compacted the bank, and a shard is gone. What was uploaded need not be again.
            folder.reload()
    raise BankError(f"the bank {folder.label!r} changes too fast to be pushed: push it again when it rests.")


class _Push:
    """One push of a bank as an index says it is."""

    def __init__(self, kind: type[AdapterBank], path: Path, index: Index, target: Target) -> None:
        self._kind = kind
        self._path = path
        self._index = index
        self._target = target
        self._repo_id = target.repo_id
        self._api = HfApi(token=target.token, **library())

    def run(self) -> CommitInfo:
        """Looks, checks, uploads, commits."""
        target = self._target
        with asking(self._repo_id, target.revision):
            head, files, is_new = self._head()
        there = self._index_of(head) if head and INDEX_NAME in files else None
        if there is not None and not target.overwrite:
            self._check_kept(there)
        has_peft = target.include_peft
        if has_peft is None:
            has_peft = there is not None and any(_peft_files(name) <= files for name in there.adapters)
        base = self._base()
        index = published(self._index, base)
        facts = Facts(self._repo_id, index, base, has_peft, target.revision, dict(target.scores or {}))
        card = write_card(facts, self._read(CARD, head) if head and CARD in files else None)
        with tempfile.TemporaryDirectory(prefix="lorakit-") as scratch:
            peft = self._export(index, Path(scratch)) if has_peft else {}
            gone = {file for file in files if shard_number(file) is not None and file not in index.shards}
            for name in there.adapters if there is not None else ():
                gone |= _peft_files(name) & files - peft.keys()
            contents = {shard: self._path / shard for shard in index.shards} | peft
            with self._uploading():
                if head is None:
                    self._api.create_repo(self._repo_id, private=target.private, exist_ok=True)
                if is_new:
                    assert target.revision is not None
                    self._api.create_branch(self._repo_id, branch=target.revision, revision=head, exist_ok=True)
                return self._api.create_commit(
                    self._repo_id,
                    [
                        *(CommitOperationAdd(name, path) for name, path in contents.items()),
                        CommitOperationAdd(INDEX_NAME, index.dump()),
                        CommitOperationAdd(CARD, card.encode()),
                        *(CommitOperationDelete(name) for name in sorted(gone)),
                    ],
                    commit_message=target.commit_message or f"Bank of {len(index.adapters)} adapters",
                    revision=target.revision,
                    create_pr=target.create_pr,
                    # Nobody else's push is undone.
                    parent_commit=head,
                )

    def _head(self) -> tuple[str | None, set[str], bool]:
        """The commit to push onto, its files, and whether its branch is to be made first."""
        is_new = False
        try:
            info = self._api.model_info(self._repo_id, revision=self._target.revision)
        except RevisionNotFoundError:
            is_new = True
            info = self._api.model_info(self._repo_id)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            return None, set(), self._target.revision not in (None, "main")
        return info.sha, {file.rfilename for file in info.siblings or ()}, is_new

    def _read(self, name: str, head: str) -> str:
        with asking(self._repo_id, head):
            path = hf_hub_download(self._repo_id, name, revision=head, token=self._target.token, **library())
            return Path(path).read_text(encoding="utf-8", errors="replace")

    def _index_of(self, head: str) -> Index | None:
        try:
            return Index.parse(self._read(INDEX_NAME, head).encode())
        except BankError as error:
            if self._target.overwrite:
                return None
            raise BankError(
                f"the repository {self._repo_id!r} holds a bank that cannot be read: {error}. Push with overwrite=True "
                "(`--overwrite`) to replace it."
            ) from error

    def _check_kept(self, there: Index) -> None:
        """Refuses to take away what somebody pushed."""
        lost = [name for name in there.adapters if name not in self._index.adapters]
        if lost:
            listed = ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
            raise AdapterExistsError(
                f"the repository {self._repo_id!r} holds adapters that this bank lacks: {listed}. Push with "
                "overwrite=True (`--overwrite`) to take them away there, or push to another repository."
            )
        if there.adapters and there.fingerprint != self._index.fingerprint:
            raise BaseModelMismatchError(
                f"the repository {self._repo_id!r} holds a bank of another base model. Push with overwrite=True "
                "(`--overwrite`) to replace it, or push to another repository."
            )

    def _base(self) -> str | None:
        """The base's Hub id, if it has one for sure."""
        base = self._target.base_model
        if base is None and is_repo_id(self._index.base_id) and not Path(self._index.base_id).exists():
            with asking(self._repo_id):
                base = self._index.base_id if self._api.repo_exists(self._index.base_id) else None
        if base is None:
            _logger.warning(
                "the card of %s names no base model, as the Hub knows none called %r; base_model= names it",
                self._repo_id,
                self._index.base_id,
            )
        return base

    def _export(self, index: Index, scratch: Path) -> dict[str, Path]:
        """PEFT folders of all adapters: path in the repository → file here."""
        bank = self._kind(FixedFolder(self._path, index))
        files: dict[str, Path] = {}
        for name in index.adapters:
            out = bank.export_peft(name, scratch / name, base_model=self._index.base_id or None)
            files |= {f"{PEFT_FOLDER}/{name}/{path.name}": path for path in out.iterdir()}
        return files

    @contextmanager
    def _uploading(self) -> Iterator[None]:
        try:
            yield
        except _UPLOAD_ERRORS as error:
            cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (409, 412):
                raise HubError(
                    f"the repository {self._repo_id!r} was changed while it was pushed to: push again; what was "
                    "uploaded is not uploaded again."
                ) from error
            raise translated(cause, self._repo_id, self._target.revision) from error


def published(index: Index, base: str | None) -> Index:
    """The index as it is pushed: without paths of this machine.

    Args:
        index: the bank's.
        base: the base's Hub id, if it has one.

    Returns:
        The index with that base, in the adapters' configurations too; a base that was a folder here has no name. Of
        sources that are absolute paths, the last part is left.
    """
    configs: dict[int, Any] = {}

    def config_of(entry: AdapterEntry) -> Any:
        # Shared by adapters of one recipe, and so it stays.
        if id(entry.config) not in configs:
            named = entry.config.get(_BASE_KEY)
            ours = isinstance(named, str) and (named == index.base_id or _is_path(named))
            configs[id(entry.config)] = {**entry.config, _BASE_KEY: base_id or None} if ours else entry.config
        return configs[id(entry.config)]

    base_id = base or ("" if _is_path(index.base_id) else index.base_id)
    adapters = {
        name: replace(
            entry,
            config=config_of(entry),
            source=PureWindowsPath(entry.source).name if _is_elsewhere(entry.source) else entry.source,
        )
        for name, entry in index.adapters.items()
    }
    return replace(index, base_id=base_id, adapters=adapters)


def _is_path(text: str) -> bool:
    """Whether a base's name is a folder's."""
    return _is_elsewhere(text) or os.path.lexists(text)


def _is_elsewhere(path: str) -> bool:
    """Whether it tells of this machine's folders."""
    return os.path.isabs(path) or path.startswith(("~", "..", "\\")) or path[1:3] in (":\\", ":/")


def _peft_files(name: str) -> set[str]:
    return {f"{PEFT_FOLDER}/{name}/{file}" for file in ("adapter_config.json", "adapter_model.safetensors")}
