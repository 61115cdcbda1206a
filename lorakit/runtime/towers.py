"""Towers: which row of a batch each image or sound of a call belongs to.

A tower (with its projector) is given all images of a call, one after another, any number of them a row. The language
model puts what comes out in the places of the placeholder tokens, row by row and in order, so the placeholders in
`input_ids` say whose an image is. That is certain where it is known how many placeholders an image fills, and only such
models are served. Knows a call's arguments and modules' paths; no name of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakit.errors import AdapterIdsError
from lorakit.runtime.pool import Slot
from lorakit.runtime.rows import Rows

_CONFIGS = ("vision_config", "audio_config", "speech_config", "video_config")
_FIXED_SIZE = ("clip_vision_model", "siglip_vision_model")


class Towers(NamedTuple):
    """The towers' part of a call.

    Attributes:
        paths: the towers' modules that some adapter touches, and that need rows of their own.
        rows: these rows; none in a call without images and sounds, which calls no tower.
    """

    paths: frozenset[str] = frozenset()
    rows: tuple[Rows, ...] = ()

    def beside(self, rows: Rows) -> list[Rows]:
        """The language model's rows, and the towers' after them."""
        if not self.paths:
            return [rows]
        return [rows._replace(paths=frozenset(rows.touched) - self.paths), *self.rows]


def has_towers(model: nn.Module) -> bool:
    """Whether the model sees or hears."""
    config = getattr(model, "config", None)
    return any(getattr(config, name, None) is not None for name in _CONFIGS)


def tower_paths(model: nn.Module, paths: Iterable[str]) -> frozenset[str]:
    """Those of the paths that lie outside the language model."""
    if not has_towers(model):
        return frozenset()
    getters = ("get_decoder", "get_output_embeddings", "get_input_embeddings")
    parts = [getattr(model, getter)() for getter in getters if hasattr(model, getter)]
    text = {id(module) for part in parts if part is not None for module in part.modules()}
    return frozenset(path for path in paths if id(model.get_submodule(path)) not in text)


def is_served(model: nn.Module) -> bool:
    """Whether images or sounds of this model can be told apart."""
    return _model_type(model) in _SERVED


def towers_of(
    model: nn.Module, paths: frozenset[str], slots: Sequence[Slot | None], given: Mapping[str, Any]
) -> Towers:
    """What the towers' modules are given.

    Args:
        model: the base, one that `is_served`.
        paths: the towers' modules that some adapter touches.
        slots: the slot of each row of the call.
        given: the call's arguments by name.

    Raises:
        AdapterIdsError: it cannot be seen whose an image or sound is.
    """
    found = _SERVED[_model_type(model)](model.config, given)
    if found is None:
        return Towers(paths)
    units, tokens = found
    if len(units) != len(slots):
        raise AdapterIdsError(f"input_ids have {len(units)} rows where the call has {len(slots)}.")
    owners = tuple(slot for slot, count in zip(slots, units, strict=True) for _ in range(count))
    return Towers(paths, (Rows(owners, tokens=tokens, paths=paths),))


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _placeholders(config: Any, given: Mapping[str, Any], kind: str) -> list[int]:
    """How many placeholder tokens each row has."""
    ids = given.get("input_ids")
    token = getattr(config, f"{kind}_token_id", None)
    token = getattr(config, f"{kind}_token_index", None) if token is None else token
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or token is None:
        raise AdapterIdsError(
            f"whose an {kind} is can be seen by its placeholders in input_ids alone; give input_ids, or one adapter "
            "for all rows."
        )
    counts: list[int] = (ids == token).sum(1).tolist()
    return counts


def _unclear(kind: str, why: str) -> AdapterIdsError:
    return AdapterIdsError(
        f"it cannot be seen which row each {kind} belongs to: {why}. Check what the processor gave, or give all rows "
        "one adapter."
    )


def _same_size(counts: Sequence[int], each: int, kind: str) -> tuple[list[int], int]:
    """Images of `each` placeholders: how many of them a row has."""
    if each < 1 or any(count % each for count in counts):
        raise _unclear(kind, f"an {kind} has {each} placeholders, and rows have {list(counts)}")
    return [count // each for count in counts], 1


def _images_of_one_size(config: Any, given: Mapping[str, Any]) -> tuple[list[int], int] | None:
    """LLaVA and Gemma 3: pixel_values (images, channels, height, width)."""
    pixels = given.get("pixel_values")
    if pixels is None:
        return None
    counts = _placeholders(config, given, "image")
    vision = getattr(config.vision_config, "model_type", None)
    if vision not in _FIXED_SIZE or pixels.dim() != 4:
        raise _unclear("image", f"a {vision} takes images of any size")
    images = pixels.shape[0]
    if not images or sum(counts) % images:
        raise _unclear("image", f"{sum(counts)} placeholders for {images} images")
    return _same_size(counts, sum(counts) // images, "image")


def _tiles_of_one_size(config: Any, given: Mapping[str, Any]) -> tuple[list[int], int] | None:
    """Idefics 3 and SmolVLM: pixel_values (rows, most images, channels, height, width), those of zeros left out."""
    if given.get("pixel_values") is None:
        return None
    side = config.vision_config.image_size // config.vision_config.patch_size
    return _same_size(_placeholders(config, given, "image"), side**2 // config.scale_factor**2, "image")


def _images_of_any_size(config: Any, given: Mapping[str, Any]) -> tuple[list[int], int] | None:
    """Qwen2-VL and Qwen2.5-VL: patches of all images or videos one after another, and a grid for each."""
    kinds = {"image": "pixel_values", "video": "pixel_values_videos"}
    present = [kind for kind, name in kinds.items() if given.get(name) is not None]
    if not present:
        return None
    if len(present) > 1:
        raise _unclear("image", "the tower is given images and videos in turn")
    [kind] = present
    grid = given.get(f"{kind}_grid_thw")
    if grid is None:
        raise _unclear(kind, f"{kind}_grid_thw is missing")
    counts = _placeholders(config, given, kind)
    sizes = (torch.as_tensor(grid).prod(-1) // config.vision_config.spatial_merge_size**2).tolist()
    filled = list(counts)
    row = 0
    for size in sizes:
        while row < len(filled) and not filled[row]:
            row += 1
        if row == len(filled) or filled[row] < size:
            raise _unclear(kind, f"they fill {sizes} placeholders, and rows have {counts}")
        filled[row] -= size
    if any(filled):
        raise _unclear(kind, f"they fill {sizes} placeholders, and rows have {counts}")
    unit = gcd(*counts)
    return [count // unit for count in counts], unit


def _one_sound_a_row(config: Any, given: Mapping[str, Any]) -> tuple[list[int], int] | None:
    """Qwen2-Audio: input_features (sounds, bins, frames); how many placeholders a sound fills is not asked."""
    sounds = given.get("input_features")
    if sounds is None:
        return None
    counts = _placeholders(config, given, "audio")
    if sounds.shape[0] != len(counts) or not all(counts):
        raise _unclear("sound", f"{sounds.shape[0]} sounds for rows with {counts} placeholders; one a row is served")
    return [1] * len(counts), 1


# Model type → how many units each row has, and how many of a module's tokens a unit brings a multiple of.
_SERVED: Mapping[str, Callable[[Any, Mapping[str, Any]], tuple[list[int], int] | None]] = {
    "gemma3": _images_of_one_size,
    "idefics3": _tiles_of_one_size,
    "llava": _images_of_one_size,
    "qwen2_5_vl": _images_of_any_size,
    "qwen2_audio": _one_sound_a_row,
    "qwen2_vl": _images_of_any_size,
    "smolvlm": _tiles_of_one_size,
}
