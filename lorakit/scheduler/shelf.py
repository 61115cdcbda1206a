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
from lorakit.errors import AdapterNotFoundError


class Shelf:
    """Adapters' bytes by their keys. All methods may be called from any thread."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Opens nothing yet.

        Args:
            folders: of banks; one that is not there yet may come.
        """
        self._lock = threading.Lock()
        self._banks: dict[Path, AdapterBank | None] = dict.fromkeys(folders)

    def read(self, key: str) -> numpy.ndarray:
        """An adapter's extent as it is stored.

        Args:
            key: stands for its content.

        Returns:
            (nbytes,) uint8.

        Raises:
            AdapterNotFoundError: no bank has it any more.
            BankCorruptedError: its shard is missing or too short.
        """
        with self._lock:
            bank, entry = self._find(key)
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        bank.read_into(entry, buffer)
        return buffer.numpy()

    def _find(self, key: str) -> tuple[AdapterBank, AdapterEntry]:
        for again in (False, True):
            for folder, bank in self._banks.items():
                if again and bank is not None:
                    bank.reload()
                elif again and (folder / INDEX_NAME).is_file():
                    bank = self._banks[folder] = AdapterBank.open(folder)
                for entry in () if bank is None else bank.entries.values():
                    if entry.blake3 == key:
                        assert bank is not None
                        return bank, entry
        raise AdapterNotFoundError(f"no bank has the adapter of content {key} any more; it was removed or replaced.")
