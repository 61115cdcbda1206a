"""Tile sizes, from data files: one a GPU, named as the device is, and a fallback for every other.

`kernels/benchmarks/tune.py` measures and writes them. Nothing is tuned while serving. The sizes never depend on the
batch, so a token's bits do not either.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent / "tuning_data"
_FALLBACK = "fallback"
_MANY = 512


@dataclasses.dataclass(frozen=True)
class Decode:
    """Tiles of the decode kernels.

    Attributes:
        block_k: columns of A a program of shrink takes.
        block_n: channels a program of expand takes.
        block_r: ranks a tile holds.
        shrink_warps: warps a program.
        expand_warps: warps a program.
    """

    block_k: int
    block_n: int
    block_r: int
    shrink_warps: int
    expand_warps: int

    def of(self, weight: torch.dtype) -> Decode:
        """The tiles for weights of a dtype: half as wide for fp32, so that they stay in registers."""
        if weight.itemsize == 2:
            return self
        return dataclasses.replace(self, block_k=self.block_k // 2, block_n=self.block_n // 2)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Tiles of the prefill kernels.

    Attributes:
        block_m: tokens a tile holds.
        block_k: columns of x and A a step of shrink takes.
        block_n: channels a block of expand holds.
        split_k: columns of x a program of shrink takes, a multiple of block_k.
        shrink_warps: warps a program.
        shrink_stages: steps of shrink that are loaded ahead.
        expand_ranks: ranks that a tile of expand holds.
        expand_warps: warps a program.
        expand_steps: blocks of channels a program of expand takes, one after the other.
        expand_stages: how many of them are under way at once.
    """

    block_m: int
    block_k: int
    block_n: int
    split_k: int
    shrink_warps: int
    shrink_stages: int
    expand_ranks: int
    expand_warps: int
    expand_steps: int
    expand_stages: int


@dataclasses.dataclass(frozen=True)
class Dense:
    """Tiles of the base's own products.

    Attributes:
        tokens: up to so many tokens they take.
        block_n: channels a program takes.
        block_k: columns of a step; the width is a multiple.
        warps: warps a program.
        stages: steps that are loaded ahead.
    """

    tokens: int
    block_n: int
    block_k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Paged:
    """Tiles of attention over a paged cache.

    Attributes:
        block: tokens of a step; a page is a multiple.
        warps: warps a program.
        stages: steps that are loaded ahead.
    """

    block: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """All tile sizes of a GPU.

    Attributes:
        decode_tokens: up to so many tokens take the decode kernels.
        decode: their tiles.
        prefill: the tiles of what is longer, for the common case: bf16 throughout, or fp16 up to rank 16.
        prefill_wide: the same for all else: smaller tiles, so that fp32's products stay in registers.
        dense: the tiles of the base's own products; None where cuBLAS's are as fast, or nobody has measured.
        paged: the tiles of attention over a paged cache; None where FlashAttention's are as fast, or nobody has
            measured.
        paged_many: the same where there are so many programs that each had better be small.
    """

    decode_tokens: int
    decode: Decode
    prefill: Prefill
    prefill_wide: Prefill
    dense: Dense | None = None
    paged: Paged | None = None
    paged_many: Paged | None = None

    def for_paged(self, programs: int) -> Paged | None:
        """The tiles of attention for rows with so many heads of keys in all."""
        return self.paged_many if programs >= _MANY else self.paged

    def for_prefill(self, values: Tensor, weight: torch.dtype, max_rank: int) -> Prefill:
        """The prefill kernels' tiles for x or y of this shape and dtype."""
        common = values.dtype == weight == torch.bfloat16 or (
            values.dtype == weight == torch.float16 and max_rank <= 16
        )
        return self.prefill if common and values.shape[-1] % 16 == 0 else self.prefill_wide


def file_name(device_name: str) -> str:
    """The data file of a GPU, by the name that CUDA gives it."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_") + ".json"


@functools.cache
def tiles(device: torch.device) -> Tiles:
    """The tile sizes for a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _FALLBACK
    path = _FOLDER / file_name(name)
    return read(path if path.exists() else _FOLDER / f"{_FALLBACK}.json")


def read(path: Path) -> Tiles:
    """Reads a data file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    prefill, wide = (Prefill(**value[name]) for name in ("prefill", "prefill_wide"))
    dense = Dense(**value["dense"]) if value["dense"] is not None else None
    paged, many = (Paged(**value[name]) if value[name] is not None else None for name in ("paged", "paged_many"))
    return Tiles(value["decode_tokens"], Decode(**value["decode"]), prefill, wide, dense, paged, many)


def write(path: Path, tiles: Tiles) -> None:
    """Writes a data file."""
    path.write_text(json.dumps(dataclasses.asdict(tiles), indent=1) + "\n", encoding="utf-8")
