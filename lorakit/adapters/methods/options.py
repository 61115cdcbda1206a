"""The options of a checkpoint's configuration: values that can be meant, and none that would be overlooked.

An option that changes the mathematics and is not served is refused by name, one of a newer PEFT because it is unknown:
silently wrong output is worse than a refusal. Knows adapter_config.json and PEFT's classes for it; knows no tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftConfig

from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError

COMMON = frozenset(
    "auto_mapping base_model_name_or_path revision peft_type peft_version task_type inference_mode target_modules "
    "exclude_modules layers_to_transform layers_pattern fan_in_fan_out runtime_config modules_to_save "
    "ensure_weight_tying".split()
)
"""Options of every method that say where an adapter sits, or nothing about what it computes."""

MOST_ELEMENTS = 1 << 30
"""No tensor that a conversion makes from options alone is larger."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What a field of adapter_config.json may hold.

    Attributes:
        name: the field.
        fits: tests a value that is not null.
        wanted: what it should be, in words.
        needed: it may not be null or missing.
    """

    name: str
    fits: Callable[[Any], bool]
    wanted: str
    needed: bool = False


def is_whole(value: object, least: int = 0) -> bool:
    """An integer of at least `least` that fits in 31 bits."""
    return type(value) is int and least <= value < 1 << 31


def is_rank(value: object) -> bool:
    """An integer of at least 1."""
    return is_whole(value, least=1)


def is_number(value: object) -> bool:
    """A number that fp32 can hold: it multiplies in fp32. Refuses NaN too, and compares integers of any size."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]


def is_flag(value: object) -> bool:
    """True or false."""
    return isinstance(value, bool)


def are_names(value: object) -> bool:
    """A pattern, or a list of names."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def maps_to(value: object, fits: Callable[[Any], bool]) -> bool:
    """A mapping from names or patterns to what fits."""
    return isinstance(value, Mapping) and all(isinstance(key, str) and fits(each) for key, each in value.items())


def rank(name: str) -> Option:
    """A rank that must be there."""
    return Option(name, is_rank, "a whole number of at least 1", needed=True)


def number(name: str) -> Option:
    """A number that must be there."""
    return Option(name, is_number, "a number that fp32 can hold", needed=True)


def flag(name: str) -> Option:
    """True or false, or not there."""
    return Option(name, is_flag, "true or false")


RANK_PATTERN = Option("rank_pattern", lambda value: maps_to(value, is_rank), "a mapping from patterns to whole numbers")
ALPHA_PATTERN = Option("alpha_pattern", lambda value: maps_to(value, is_number), "a mapping from patterns to numbers")

TARGETS = (
    Option(
        "target_modules",
        lambda value: are_names(value) and bool(value),
        "a pattern or a list of modules' names",
        needed=True,
    ),
    Option("exclude_modules", are_names, "a pattern or a list of modules' names"),
    Option(
        "layers_to_transform",
        lambda value: is_whole(value) or (isinstance(value, list) and all(map(is_whole, value))),
        "a layer's number or a list of them",
    ),
    Option("layers_pattern", are_names, "a name or a list of names"),
)
"""The options that say which modules are meant."""


def check_config(
    checkpoint: Checkpoint,
    kind: type[PeftConfig],
    options: Iterable[Option],
    *,
    harmless: str = "",
    refused: Mapping[str, str] = MappingProxyType({}),
    empty: Collection[str] = (),
) -> None:
    """Refuses a configuration that a family's formula would be wrong for, or that cannot be meant.

    Args:
        checkpoint: the checkpoint.
        kind: PEFT's class of its configuration.
        options: what the family reads, beside the targets.
        harmless: more options that do not change what a trained adapter computes, separated by spaces.
        refused: options that do, and why they are not served.
        empty: those of them that count as set by {} too.

    Raises:
        UnsupportedMethodError: an option that is refused or unknown is set.
        CheckpointError: a value that cannot be.
    """
    options = [*options, *TARGETS]
    refuse_set(checkpoint, refused, empty)
    known = COMMON | {"bias", *harmless.split(), *(option.name for option in options), *refused}
    refuse_unknown(checkpoint, known)
    check_values(checkpoint, options)
    check_by_peft(checkpoint, kind)


def refuse_set(checkpoint: Checkpoint, refused: Mapping[str, str], empty: Collection[str] = ()) -> None:
    """Refuses options that are set: name → why. Those of `empty` are set as {} too: PEFT then takes defaults."""
    for option, reason in refused.items():
        value = checkpoint.config.get(option)
        if value or (option in empty and value is not None):
            raise UnsupportedMethodError(f"{checkpoint.source}: {option} is not served: {reason}.")


def refuse_unknown(checkpoint: Checkpoint, known: Collection[str]) -> None:
    """Refuses options that are set and not known: one of a newer PEFT may change the mathematics."""
    unknown = sorted(key for key, value in checkpoint.config.items() if value and key not in known)
    if unknown:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: adapter_config.json sets options that this lorakit does not know "
            f"({', '.join(unknown)}), so it cannot promise PEFT's outputs; upgrade lorakit."
        )


def check_values(checkpoint: Checkpoint, options: Iterable[Option]) -> None:
    """Refuses values of the wrong type or range."""
    config = checkpoint.config
    for option in options:
        value = config.get(option.name)
        if not option.fits(value) if value is not None else option.needed:
            found = shown(value) if option.name in config else "missing"
            raise CheckpointError(
                f"{checkpoint.source}: {option.name} of adapter_config.json is {found}, but should be {option.wanted}; "
                "save the adapter again."
            )


def check_by_peft(checkpoint: Checkpoint, kind: type[PeftConfig]) -> None:
    """Refuses what PEFT's own class does not take."""
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    try:
        kind(**{key: value for key, value in checkpoint.config.items() if key in known})
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{checkpoint.source}: PEFT does not take this adapter_config.json: {error}. Save the adapter again."
        ) from error


def check_size(checkpoint: Checkpoint, option: str, elements: int) -> None:
    """Refuses an option that asks for more memory than any adapter takes, where no tensor of the file bounds it.

    Args:
        checkpoint: the checkpoint.
        option: the option at fault.
        elements: of the tensors that it asks for.

    Raises:
        CheckpointError: naming the option.
    """
    if elements > MOST_ELEMENTS:
        raise CheckpointError(
            f"{checkpoint.source}: {option}={shown(checkpoint.config.get(option))} asks for {elements:,} numbers, more "
            f"than the {MOST_ELEMENTS:,} that an adapter may; save the adapter again."
        )


def shown(value: object) -> str:
    """A value in a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
