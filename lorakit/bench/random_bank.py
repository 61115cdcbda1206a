"""Banks of random adapters, made in no time: they lie in memory, and many of them share a content.

Thousands of adapters of 80 MB fit neither a disk nor host memory. What is shared here is the bytes in host memory that
adapters are read or copied from: so many contents, in turn. Nothing else is. Each adapter has a name and a hash of its
own, which are all that lorakit tells adapters by, so that entries, host cache, slots, eviction and copies work as on
adapters that all differ; and what a device holds lies there once for each. A host's processor caches hold no content
of this size, so a copy is no faster for being shared.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorakit.adapters import fingerprint
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.folder import BankFolder
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.index import Index
from lorakit.adapters.layout import Extent, Layout
from lorakit.bench.llamas import LINEARS
from lorakit.runtime.host_cache import HostExtent
from lorakit.runtime.model import MultiLoraModel

CONTENTS = 32
"""Different contents, if nothing else is said: 2.6 GB of adapters of a 7B Llama at rank 16."""


class _Contents(BankFolder):
    """A bank's folder without files: an entry's shard names a content."""

    def __init__(self, index: Index, contents: dict[str, torch.Tensor]) -> None:
        super().__init__(Path("random"), index)
        self.contents = contents

    def read(self, entry: AdapterEntry, nbytes: int) -> torch.Tensor:
        return self.contents[entry.shard][:nbytes].clone()

    def read_into(self, entry: AdapterEntry, buffer: torch.Tensor) -> None:
        buffer.copy_(self.contents[entry.shard][: buffer.numel()])


class RandomBank(AdapterBank):
    """A bank of random LoRA adapters on all linear layers of a base, in memory alone."""

    def __init__(
        self, base: PreTrainedModel, adapters: int, *, rank: int, dtype: torch.dtype, contents: int = CONTENTS
    ) -> None:
        """Draws the contents.

        Args:
            base: the base; on a GPU it draws, and the contents lie in pinned memory.
            adapters: how many.
            rank: of each.
            dtype: of A and B.
            contents: how many of them differ.
        """
        layout = _layout(base, rank, dtype)
        made = {f"content-{number:04d}": _content(base, layout, dtype, number) for number in range(contents)}
        shards = list(made)
        entries = {}
        for number in range(adapters):
            name = f"tenant-{number:04d}"
            entries[name] = AdapterEntry(
                name,
                "lora",
                layout,
                {"peft_type": "LORA"},
                dtype,
                source="random",
                shard=shards[number % contents],
                blake3=hashlib.sha256(name.encode()).hexdigest(),
            )
        facts = json.loads(json.dumps(fingerprint.fingerprint(BaseModel.of(base))))
        self.contents = made
        super().__init__(_Contents(Index("llama", facts, adapters=entries), made))

    def on_disk(self, folder: Path) -> AdapterBank:
        """A bank of the same adapters in a folder."""
        items = [(name, partial(self.form, name), "random") for name in self.names]
        return AdapterBank.write(folder, items, base_id=self.base_id, fingerprint=self.fingerprint)

    def hold_in_host(self, model: MultiLoraModel) -> None:
        """Makes all adapters ready in host memory, as a host that had room for all would have them.

        Each has an entry of its own in the host cache, whose limit counts each with all its bytes; the pages are the
        contents'.
        """
        host = model.pool.host
        with model.lock:
            host.limit = 2 * sum(entry.nbytes for entry in self.values())  # pinned bytes count to a power of two
            for entry in self.values():
                host.keep(entry.blake3, HostExtent(entry.layout, entry.dtype, self.contents[entry.shard]))
            assert len(host.keys) == len(self), "all of them fit"


def _layout(base: PreTrainedModel, rank: int, dtype: torch.dtype) -> Layout:
    modules = {
        path: ModuleForm(
            "linear",
            module.in_features,
            module.out_features,
            torch.empty(rank, module.in_features, dtype=dtype, device="meta"),
            torch.empty(module.out_features, rank, dtype=dtype, device="meta"),
        )
        for path, module in base.named_modules()
        if path.endswith(LINEARS) and isinstance(module, torch.nn.Linear)
    }
    return Layout.of(AdapterForm("lora", modules, {"peft_type": "LORA"}))


def _content(base: PreTrainedModel, layout: Layout, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """(layout.nbytes(dtype),) uint8 in host memory: all weights in one draw."""
    generator = torch.Generator(base.device).manual_seed(seed)
    drawn = torch.randn(layout.weights_elements, generator=generator, device=base.device, dtype=dtype).mul_(0.02)
    content = torch.zeros(layout.nbytes(dtype), dtype=torch.uint8, pin_memory=base.device.type == "cuda")
    Extent.of_bytes(layout, dtype, content).weights.copy_(drawn)
    return content
