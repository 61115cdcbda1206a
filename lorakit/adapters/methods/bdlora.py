"""BD-LoRA: LoRA with one factor block-diagonal, stored as its blocks one below the other.

peft.tuners.lora.variants.BlockDiagonalLinear: n blocks of a weight (out, in / n), each for its share of the inputs.
Unpacked, A = block_diag(A_1, …, A_n) or B likewise, and y = W x + b + s · B A x as ever. use_bdlora names the modules
by parts of their paths.

Source: peft.BdLoraConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorakit.adapters.methods.options import is_flag, is_rank
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, UnsupportedMethodError

_PATTERNS = ("target_modules_bd_a", "target_modules_bd_b")
WANTED = "target_modules_bd_a and target_modules_bd_b as lists of names, nblocks as a whole number, match_strict"


def fits(value: object) -> bool:
    """A configuration of use_bdlora that can be meant."""
    return (
        isinstance(value, Mapping)
        and value.keys() <= {*_PATTERNS, "nblocks", "match_strict"}
        and all(_are_names(value.get(name) or []) for name in _PATTERNS)
        and is_rank(value.get("nblocks", 1))
        and is_flag(value.get("match_strict", True))
    )


def is_bdlora(checkpoint: Checkpoint) -> bool:
    """An empty configuration is one too: PEFT then takes its defaults."""
    return checkpoint.config.get("use_bdlora") is not None


def blocks(checkpoint: Checkpoint, place: Place, path: str) -> Mapping[str, int]:
    """The factor of a module that is packed ("a" or "b") → its number of blocks; empty where none is.

    Raises:
        CheckpointError: the configuration names both factors, or none though every module must have one.
        UnsupportedMethodError: PEFT has no block-diagonal factors for this kind of module.
    """
    if not is_bdlora(checkpoint):
        return {}
    config: Mapping[str, Any] = checkpoint.config["use_bdlora"]
    packed = [name[-1] for name in _PATTERNS if any(pattern in path for pattern in config.get(name) or [])]
    if len(packed) > 1 or (not packed and config.get("match_strict", True)):
        found = "both factors" if packed else "no factor"
        raise CheckpointError(
            f"{checkpoint.source}: use_bdlora makes {found} of {path} block-diagonal, which PEFT does not take; "
            "save the adapter again."
        )
    if place.kind == "embedding" or (packed and place.transposed):
        raise UnsupportedMethodError(f"{checkpoint.source}: PEFT has no use_bdlora for {path}, which is no nn.Linear.")
    return dict.fromkeys(packed, config.get("nblocks", 1))


def packed_shape(checkpoint: Checkpoint, path: str, shape: tuple[int, int], count: int) -> tuple[int, int]:
    """The shape that a factor of this shape is stored in.

    Raises:
        CheckpointError: the blocks do not divide it.
    """
    height, width = shape
    if height % count or width % count:
        raise CheckpointError(
            f"{checkpoint.source}: nblocks={count} of use_bdlora does not divide the {height} × {width} of {path}; "
            "save the adapter again."
        )
    return height, width // count


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The whole factor."""
    return torch.block_diag(*packed.chunk(count))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
