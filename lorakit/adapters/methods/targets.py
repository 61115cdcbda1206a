"""Which modules of a base a checkpoint is for, by PEFT's own rules.

PEFT leaves modules that lack weights as the base has them, and overlooks weights of modules that its configuration does
not name. Both are refused here: they are a damaged checkpoint, or one of another base. Knows target_modules and what
narrows it, and options that patterns set module by module; knows no tensor's meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorakit.adapters.base import BaseModel
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, ModuleNotFoundInBaseError

_NARROWING = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
"""The options that narrow target_modules."""
PATTERN_ERRORS = (re.error, OverflowError, RecursionError)
"""What compiling and matching an untrusted pattern can raise."""


def place_at(checkpoint: Checkpoint, base: BaseModel, path: str) -> Place:
    """The place at a path.

    Raises:
        ModuleNotFoundInBaseError: the base has no module there that can carry an adapter.
    """
    place = base.places.get(path)
    if place is None:
        raise ModuleNotFoundInBaseError(
            f"{checkpoint.source}: the base model {base.id or base.architecture!r} ({base.architecture}) has no "
            f"module {path!r} that can carry an adapter; was it trained on another base, or with another head?"
        )
    return place


def check_modules(checkpoint: Checkpoint, base: BaseModel, paths: Collection[str]) -> None:
    """Refuses weights for other modules than the configuration targets.

    Args:
        checkpoint: the checkpoint.
        base: the base model.
        paths: the modules that it has weights for.

    Raises:
        ModuleNotFoundInBaseError: the base lacks one.
        CheckpointError: weights are missing, or are there for modules that are not targeted.
    """
    for path in paths:
        place_at(checkpoint, base, path)
    wanted = targeted(checkpoint, base)
    missing = [path for path in base.places if path in wanted and path not in paths]
    if missing:
        raise CheckpointError(
            f"{checkpoint.source}: the weights lack {len(missing)} of the modules that target_modules names, "
            f"for example {missing[0]!r}; the file is incomplete, or was trained on another base."
        )
    surplus = [path for path in paths if path not in wanted]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.source}: there are weights for {len(surplus)} modules, for example {surplus[0]!r}, that "
            "target_modules and its exceptions do not name, so PEFT would not use them; save the adapter again."
        )


def targeted(checkpoint: Checkpoint, base: BaseModel) -> frozenset[str]:
    """The places that PEFT would adapt: of norms none, whatever a pattern matches."""
    try:
        meant = repr([checkpoint.config.get(field) for field in ("task_type", "target_modules", *_NARROWING)])
    except RecursionError as error:  # lists in lists
        raise _no_pattern(checkpoint, error) from error
    if meant not in base.targeted:
        paths = [path for path, place in base.places.items() if place.kind != "norm"]
        base.targeted[meant] = matches(checkpoint, base, paths)
    return base.targeted[meant]


def matches(checkpoint: Checkpoint, base: BaseModel, paths: Iterable[str]) -> frozenset[str]:
    """Those of the paths that target_modules names, and what narrows it leaves."""
    config = checkpoint.config
    targets = config.get("target_modules")
    if targets is None:  # target_parameters names all there is
        return frozenset()
    if isinstance(targets, str) and targets.lower() == "all-linear":
        # PEFT puts their names in its place, and only then looks at exceptions.
        targets = base.all_linear - ({base.classifier} if config.get("task_type") == "SEQ_CLS" else set())
    matcher = SimpleNamespace(
        target_modules=targets, target_parameters=None, **{field: config.get(field) for field in _NARROWING}
    )
    try:
        return frozenset(path for path in paths if check_target_module_exists(matcher, path))
    except PATTERN_ERRORS as error:
        raise _no_pattern(checkpoint, error) from error


def _no_pattern(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.source}: a pattern in target_modules, exclude_modules or layers_pattern is no regular "
        f"expression ({error}); save the adapter again."
    )


def by_pattern(checkpoint: Checkpoint, patterns: str, default: str, path: str) -> Any:
    """A module's value of an option that patterns may set, as PEFT finds it: the first that matches the path's end.

    Args:
        checkpoint: the checkpoint.
        patterns: the option that maps patterns to values.
        default: the option that holds where none matches.
        path: the module's path.

    Raises:
        CheckpointError: a pattern is no regular expression.
    """
    values = checkpoint.config.get(patterns)
    if not values:
        return checkpoint.config[default]
    try:
        return values.get(get_pattern_key(values, path), checkpoint.config[default])
    except PATTERN_ERRORS as error:
        raise CheckpointError(
            f"{checkpoint.source}: a pattern in {patterns} is no regular expression ({error}); save the adapter again."
        ) from error


def rank_and_scale(checkpoint: Checkpoint, path: str) -> tuple[int, float]:
    """r and s of a LoRA at a path: s = alpha / r, or alpha / √r for rsLoRA (peft.tuners.lora.LoraLayer).

    Raises:
        CheckpointError: a pattern is no regular expression.
    """
    rank: int = by_pattern(checkpoint, "rank_pattern", "r", path)
    alpha: float = by_pattern(checkpoint, "alpha_pattern", "lora_alpha", path)
    return rank, alpha / math.sqrt(rank) if checkpoint.config.get("use_rslora") else alpha / rank
