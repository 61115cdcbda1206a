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

_FOLDER = Path(__file__).parent / "tuning_data"
_FALLBACK = "fallback"


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


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Tiles of the prefill kernels.

    Attributes:
        block_m: tokens a tile holds.
        block_k: columns of x and A a step of shrink takes.
        block_n: channels a program of expand takes.
        split_k: columns of x a program of shrink takes, a multiple of block_k.
        shrink_warps: warps a program.
        shrink_stages: steps of shrink that are loaded ahead.
        expand_warps: warps a program.
    """

    block_m: int
    block_k: int
    block_n: int
    split_k: int
    shrink_warps: int
    shrink_stages: int
    expand_warps: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """All tile sizes of a GPU.

    Attributes:
        decode_tokens: up to so many tokens take the decode kernels.
        decode: their tiles.
        prefill: the tiles of what is longer.
    """

    decode_tokens: int
    decode: Decode
    prefill: Prefill


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
    return Tiles(value["decode_tokens"], Decode(**value["decode"]), Prefill(**value["prefill"]))


def write(path: Path, tiles: Tiles) -> None:
    """Writes a data file."""
    path.write_text(json.dumps(dataclasses.asdict(tiles), indent=1) + "\n", encoding="utf-8")
