"""Where replicas' adapters come from: banks' folders, read by the adapters' contents."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch

from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.folder import INDEX_NAME
from lorakit.errors import AdapterNotFoundError, BankCorruptedError, BankError


class Shelf:
    """Adapters' bytes by their keys. All methods may be called from any thread."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Opens nothing yet.

        Args:
            folders: of banks, or of folders of banks; what is not there yet may come, and banks may go.
        """
        self._lock = threading.Lock()
        self._folders = list(folders)
        self._banks: dict[Path, AdapterBank] = {}

    def read(self, key: str) -> numpy.ndarray:
        """An adapter's extent as it is stored.

        Args:
            key: stands for its content.

        Returns:
            (nbytes,) uint8.

        Raises:
            AdapterNotFoundError: no bank has it any more.
            BankCorruptedError: its shard is missing or too short.
            BankError: no bank has it of those whose index can be read.
        """
        damage: BankError | None = None
        for again in (False, True):
            with self._lock:
                if again:
                    damage = self._look()
                found = self._find(key)
            for bank, entry in found:
                buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
                try:
                    bank.read_into(entry, buffer)
                except BankCorruptedError as error:  # it may have gone since, and another have the same
                    damage = error
                else:
                    return buffer.numpy()
        raise damage or AdapterNotFoundError(
            f"no bank has the adapter of content {key} any more; it was removed or replaced."
        )

    def _look(self) -> BankError | None:
        """Sees which banks there are by now, and what they hold.

        Returns:
            The error, if one of them cannot be read.
        """
        damage = None
        places = [place for folder in self._folders for place in (folder, *sorted(folder.glob("*/")))]
        there = {place: self._banks.get(place) for place in places if (place / INDEX_NAME).is_file()}
        self._banks = {}
        for place, bank in there.items():
            try:
                if bank is None:
                    bank = AdapterBank.open(place)
                else:
                    bank.reload()
            except BankError as error:
                if (place / INDEX_NAME).is_file():  # it has not gone just now
                    damage = error
            else:
                self._banks[place] = bank
        return damage

    def _find(self, key: str) -> list[tuple[AdapterBank, AdapterEntry]]:
        return [
            (bank, entry) for bank in self._banks.values() for entry in bank.entries.values() if entry.blake3 == key
        ]
