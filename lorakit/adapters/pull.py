"""Banks on the Hub → files here: all of a bank, or the byte ranges of a few adapters.

Everything comes from one commit: `bank.json` is fetched first, by the revision, and the rest by the commit that it was
found in. A whole bank is huggingface_hub's to fetch, into its cache. Of a few adapters only their ranges are fetched,
into a bank of their own in the cache for assets, a folder a commit; what is there already, or came with another commit,
is not fetched again. Every adapter is compared with its BLAKE3 hash before it is used. A pulled bank does not change.

Knows files, ranges and hashes; knows no tensor's meaning.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3
from filelock import FileLock
from huggingface_hub import cached_assets_path, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff, tqdm

from lorakit.adapters.damage import WRONG_HASH, Damage
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.folder import INDEX_NAME, BankFolder, FixedFolder, load_index
from lorakit.adapters.hub import asking, library
from lorakit.adapters.index import Index
from lorakit.adapters.shard import ShardSeries
from lorakit.errors import BankCorruptedError, BankError, HubError

BLOCK_BYTES = 16 << 20
"""So much is asked for at once: a connection that breaks costs no more."""

SHARD_BYTES = 256 << 20
"""After so many bytes what was fetched is put into the bank here: a process that is killed loses no more."""

_REQUESTS = 8  # at a time
_COMMIT = re.compile(r"[0-9a-f]{40}")
_RETRIED = (408, 429, 500, 502, 503, 504)


class PulledFolder(FixedFolder):
    """A bank, or some of its adapters, as one commit of a repository has it."""

    def __init__(self, path: Path, index: Index, repo_id: str) -> None:
        super().__init__(path, index)
        self.repo_id = repo_id

    @property
    def label(self) -> str:
        """The repository."""
        return self.repo_id

    @property
    def remedy(self) -> str:
        """What to do where its files are not what its index says."""
        return f"Delete {self.path} and open the bank again: it is fetched anew."


def pull(repo_id: str, revision: str | None, adapters: Iterable[str] | None, token: str | bool | None) -> PulledFolder:
    """Brings a bank here, or some of its adapters.

    Args:
        repo_id: the repository.
        revision: a branch, a tag or a commit; None: main.
        adapters: their names; None: all.
        token: as huggingface_hub takes it.

    Returns:
        The bank's files, seen by an index that names these adapters alone.

    Raises:
        HubError: the Hub cannot be reached, refuses, or does not have it; or the cache cannot be written.
        BankError: the repository holds no bank, or one that this lorakit cannot read.
        AdapterNotFoundError, AdapterNameError, ConfigError: `adapters` names one that is not there, or one twice, or is
            no list.
        BankCorruptedError: what came is not what the index says.
    """
    snapshot, index = _index(repo_id, revision, token)
    wanted = index if adapters is None else index.only(adapters, f"bank {repo_id!r}")
    commit = _Commit(repo_id, snapshot.name, index, token)
    if adapters is None:
        commit.fetch_whole(snapshot)
    elif not commit.is_here(snapshot, wanted.shards):
        local = commit.fetch(list(wanted.adapters.values()))
        places = local.changed({name: local.adapters[name] for name in wanted.adapters})
        return PulledFolder(commit.folder, places, repo_id)
    return PulledFolder(snapshot, wanted, repo_id)


def look(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> PulledFolder:
    """Brings a bank's index here; its adapters can be listed, not read.

    Raises:
        HubError, BankError: as `pull`.
    """
    snapshot, index = _index(repo_id, revision, token)
    return PulledFolder(snapshot, index, repo_id)


def _index(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, Index]:
    """The commit's folder in huggingface_hub's cache, and the bank's index."""
    with asking(repo_id, revision):
        try:
            path = Path(hf_hub_download(repo_id, INDEX_NAME, revision=revision, token=token, **library()))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise _no_bank(repo_id, revision, token) from error
    if not _COMMIT.fullmatch(path.parent.name):
        raise HubError(f"the Hub names no commit of {repo_id!r}: check HF_ENDPOINT.")
    try:
        return path.parent, load_index(path.parent)
    except BankError as error:
        raise BankError(f"the bank of the repository {repo_id!r} cannot be used: {error}") from error


def _no_bank(repo_id: str, revision: str | None, token: str | bool | None) -> BankError:
    name = repo_id.split("/")[-1]
    with suppress(EntryNotFoundError):
        hf_hub_download(repo_id, "adapter_config.json", revision=revision, token=token, **library())
        return BankError(
            f"the repository {repo_id!r} holds one PEFT adapter and no bank: pack it with "
            f"lorakit.export({{{name!r}: {repo_id!r}}}, folder) (`lorakit export FOLDER {name}={repo_id}`)."
        )
    return BankError(
        f"the repository {repo_id!r} holds no {INDEX_NAME}, so no bank: check its name and the revision, or push a "
        "bank there with bank.push_to_hub (`lorakit push`)."
    )


class _Commit:
    """One commit of a bank's repository.

    Attributes:
        folder: where the adapters are kept that are fetched one by one.
    """

    def __init__(self, repo_id: str, commit: str, index: Index, token: str | bool | None) -> None:
        self._repo_id = repo_id
        self._commit = commit
        self._index = index
        self._token = token
        home = Path(constants.HF_ASSETS_CACHE, "lorakit", repo_id.replace("/", "--"), "default")
        with suppress(OSError, ValueError):  # where nothing can be written, perhaps nothing must be
            home = cached_assets_path("lorakit", namespace=repo_id, assets_dir=constants.HF_ASSETS_CACHE)
        self.folder = home / commit
        # Beside the folder: there while a whole bank is fetched, until it was compared with its hashes.
        self._unverified = home / f"{commit}.unverified"

    def is_here(self, snapshot: Path, shards: Iterable[str]) -> bool:
        """Whether huggingface_hub's cache holds these shards, compared with their hashes."""
        return not self._unverified.exists() and not self._missing(snapshot, shards)

    def _missing(self, snapshot: Path, shards: Iterable[str]) -> list[str]:
        sizes = {shard: self._index.shards[shard].nbytes for shard in shards}
        found = {shard: (snapshot / shard).stat().st_size for shard in sizes if (snapshot / shard).is_file()}
        return [shard for shard, nbytes in sizes.items() if found.get(shard) != nbytes]

    # All of it

    def fetch_whole(self, snapshot: Path) -> None:
        """Brings all shards into huggingface_hub's cache, and compares them with their hashes."""
        if self.is_here(snapshot, self._index.shards):
            return
        with asking(self._repo_id, self._commit), FileLock(self._unverified.with_suffix(".lock")):
            if self.is_here(snapshot, self._index.shards):
                return
            self._unverified.touch()
            # The index's names are checked, and are no patterns.
            snapshot_download(
                self._repo_id,
                revision=self._commit,
                allow_patterns=[INDEX_NAME, *self._index.shards],
                token=self._token,
                **library(),
            )
            if missing := self._missing(snapshot, self._index.shards):
                # Without a network, what is there is given; to ask for the one that is not says why it is not.
                try:
                    hf_hub_download(self._repo_id, missing[0], revision=self._commit, token=self._token, **library())
                except LocalEntryNotFoundError:
                    raise
                except EntryNotFoundError as error:
                    raise self._wrong(f"the repository has no {missing[0]}") from error
                _drop(snapshot / missing[0])
                raise self._wrong(f"{missing[0]} has another size than the index says")
            self._compare(snapshot)
            self._unverified.unlink()

    def _compare(self, snapshot: Path) -> None:
        folder = BankFolder(snapshot, self._index)
        entries = sorted(self._index.adapters.values(), key=lambda entry: (entry.shard, entry.offset))
        with (
            ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="lorakit-verify") as pool,
            self._bar("compare", entries) as bar,
        ):
            for entry, data in zip(entries, pool.map(partial(_read, folder), entries), strict=True):
                if data is None:
                    _drop(snapshot / entry.shard)
                    raise self._wrong(Damage(entry.shard, entry.name, WRONG_HASH))
                bar.update(entry.stored_nbytes)

    # Some of it

    def fetch(self, entries: Sequence[AdapterEntry]) -> Index:
        """Brings adapters into the commit's own folder.

        Returns:
            The index of that folder, in which at least these are.
        """
        with suppress(BankError):
            folder = BankFolder.open(self.folder)
            if not _lacking(folder, entries):
                return folder.index
        try:
            self._found()
            folder = BankFolder.open(self.folder)
            with folder.changing():
                self._fetch_into(folder, entries)
        except (HubError, BankCorruptedError):
            raise
        except BankError as error:
            raise HubError(
                f"adapters of {self._repo_id!r} cannot be kept in the cache: {error} Or set HF_HOME to another folder, "
                f"or delete {self.folder}."
            ) from error
        return folder.index

    def _found(self) -> None:
        """Makes the folder, unless another process was faster."""
        if (self.folder / INDEX_NAME).exists():
            return
        empty = Index(self._index.base_id, self._index.fingerprint)
        try:
            with BankFolder.founding(self.folder, empty) as folder:
                folder.replace_index(empty)
        except BankError:
            if not (self.folder / INDEX_NAME).exists():
                raise

    def _fetch_into(self, folder: BankFolder, entries: Sequence[AdapterEntry]) -> None:
        """Under the folder's lock."""
        lacking = deque(_lacking(folder, entries))
        fetched = self._fetched(list(lacking))
        error: HubError | BankCorruptedError | None = None
        with self._bar("fetch", lacking) as bar:
            while lacking and error is None:
                with ShardSeries(folder.path, folder.index.next_shard) as series:
                    nbytes = 0
                    try:
                        while lacking and nbytes < SHARD_BYTES:
                            entry, blocks = next(fetched)
                            lacking.popleft()
                            longest = max((len(entry.name) for entry in lacking), default=0)
                            series.add(entry, blocks, len(lacking), longest)
                            nbytes += entry.stored_nbytes
                            bar.update(entry.stored_nbytes)
                    except (HubError, BankCorruptedError) as found:
                        error = found  # what came before it is kept
                    added, shards = series.finish()
                # Where somebody deleted a shard, its adapters are among those that were lacking.
                there = {**folder.index.adapters, **{entry.name: entry for entry in added}}
                folder.replace_index(folder.index.changed(there, shards))
        if error is not None:
            raise error

    def _fetched(self, entries: Sequence[AdapterEntry]) -> Iterator[tuple[AdapterEntry, list[memoryview]]]:
        """Adapters and their bytes, compared with their hashes, in order; some are asked for ahead."""
        elsewhere = self._elsewhere()
        waiting: deque[tuple[AdapterEntry, list[Future[memoryview]]]] = deque()
        pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="lorakit-pull")
        try:
            for entry in entries:
                data = _read(*elsewhere[entry.blake3]) if entry.blake3 in elsewhere else None
                if data is not None:
                    blocks = [_done(data)]
                else:
                    blocks = [pool.submit(self._block, entry, *ends) for ends in _blocks(entry)]
                waiting.append((entry, blocks))
                while sum(len(blocks) for _, blocks in waiting) > _REQUESTS:
                    yield self._arrived(*waiting.popleft())
            while waiting:
                yield self._arrived(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _elsewhere(self) -> dict[str, tuple[BankFolder, AdapterEntry]]:
        """Hash → an adapter that was fetched with another commit."""
        found: dict[str, tuple[BankFolder, AdapterEntry]] = {}
        for path in sorted(self.folder.parent.iterdir()):
            if path != self.folder and _COMMIT.fullmatch(path.name):
                with suppress(BankError):
                    other = BankFolder.open(path)
                    found |= {entry.blake3: (other, entry) for entry in other.index.adapters.values()}
        return found

    def _arrived(
        self, entry: AdapterEntry, blocks: Sequence[Future[memoryview]]
    ) -> tuple[AdapterEntry, list[memoryview]]:
        data = [block.result() for block in blocks]
        digest = blake3()
        for block in data:
            digest.update(block)
        if digest.hexdigest() != entry.blake3 or sum(map(len, data)) != entry.stored_nbytes:
            raise self._wrong(Damage(entry.shard, entry.name, WRONG_HASH))
        return entry, data

    def _block(self, entry: AdapterEntry, begin: int, end: int) -> memoryview:
        """Asks for some bytes of a shard; huggingface_hub asks again where that fails."""
        url = hf_hub_url(self._repo_id, entry.shard, revision=self._commit)
        headers = build_hf_headers(token=self._token, **library())
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with asking(self._repo_id, self._commit):
            response = http_backoff(
                "GET",
                url,
                headers=headers,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                retry_on_status_codes=_RETRIED,
            )
            try:
                hf_raise_for_status(response)
            except EntryNotFoundError as error:
                raise self._wrong(f"the repository has no {entry.shard}") from error
            except HfHubHTTPError as error:
                if error.response.status_code == 416:
                    raise self._wrong(Damage(entry.shard, entry.name, "the file ends before it")) from error
                raise
        if response.status_code != 206:
            raise HubError(
                f"the server gives no ranges of {entry.shard} of {self._repo_id!r}: open the bank without `adapters`, "
                "which fetches all of it."
            )
        range_ = f"bytes {begin}-{end - 1}/{self._index.shards[entry.shard].nbytes}"
        if response.headers.get("Content-Range") != range_ or len(response.content) != end - begin:
            raise self._wrong(Damage(entry.shard, entry.name, "the file has another size than the index says"))
        return memoryview(response.content)

    def _wrong(self, what: object) -> BankCorruptedError:
        return BankCorruptedError(
            f"bank {self._repo_id!r}: {what}, so it is not used. Open the bank again; if it fails again, whoever "
            "pushed it must push it once more."
        )

    def _bar(self, what: str, entries: Iterable[AdapterEntry]) -> Any:
        total = sum(entry.stored_nbytes for entry in entries)
        name = f"{what} {self._repo_id}"
        return tqdm(total=total, desc=name, unit="B", unit_scale=True, name="lorakit.pull", disable=not total or None)


def _lacking(folder: BankFolder, entries: Iterable[AdapterEntry]) -> list[AdapterEntry]:
    """Those that a folder does not hold."""
    there = folder.index.adapters
    files = {shard for shard in folder.index.shards if (folder.path / shard).is_file()}
    return [
        entry
        for entry in entries
        if entry.name not in there or there[entry.name].blake3 != entry.blake3 or there[entry.name].shard not in files
    ]


def _blocks(entry: AdapterEntry) -> Iterator[tuple[int, int]]:
    """An adapter's range, cut into what is asked for at once: first byte, byte after the last."""
    last = entry.offset + entry.stored_nbytes
    return ((begin, min(begin + BLOCK_BYTES, last)) for begin in range(entry.offset, last, BLOCK_BYTES))


def _done(data: memoryview) -> Future[memoryview]:
    future: Future[memoryview] = Future()
    future.set_result(data)
    return future


def _read(folder: BankFolder, entry: AdapterEntry) -> memoryview | None:
    """An adapter's bytes from a file here; None if they are not those that were hashed."""
    try:
        data = folder.read(entry, entry.stored_nbytes).numpy().data
    except BankCorruptedError:
        return None
    return data if blake3(data).hexdigest() == entry.blake3 else None


def _drop(pointer: Path) -> None:
    """Takes a file out of huggingface_hub's cache, so that it is fetched anew."""
    with suppress(OSError):
        pointer.resolve().unlink()
    with suppress(OSError):
        pointer.unlink()
