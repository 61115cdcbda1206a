"""Prompts: the tokens of a call, and where in them an activated adapter begins to act.

An activated LoRA (aLoRA) acts from the start of the last occurrence of its invocation tokens in its row's prompt on;
where they do not occur, the row is the base's. Knows a call's arguments as transformers takes them; no module, no slot.

Sources: Greenewald et al. 2025, Activated LoRA (arXiv 2504.12397); peft.tuners.lora.variants.calculate_alora_offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lorakit.errors import AdapterIdsError

_REMEDY = "alora_offsets, for each row the number of its last tokens that the adapter acts on, or None"


class Prompt(NamedTuple):
    """What a call is given of its rows' text.

    Attributes:
        ids: (rows, length), or None where the call brings embeddings alone.
        length: tokens of a row, padding included.
        first: tokens that lie before these, in a cache.
        whole: nothing lies before them.
    """

    ids: torch.Tensor | None
    length: int
    first: int
    whole: bool


def prompt_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, generating: bool) -> Prompt:
    """The prompt in the arguments of a `forward` or a `generate`.

    Args:
        args: positional; ids come first.
        kwargs: by name.
        generating: a `generate`, whose ids may hold what its cache holds too.

    Raises:
        AdapterIdsError: there is no text in them.
    """
    ids = next((kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None), None)
    ids = args[0] if ids is None and args else ids
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
        ids = None
    embeds = kwargs.get("inputs_embeds")
    if embeds is None and ids is None:
        raise AdapterIdsError(
            "an adapter acts from its invocation tokens on, and the call has no input_ids; give them."
        )
    length: int = (ids if embeds is None else embeds).shape[1]  # type: ignore[union-attr]
    if embeds is not None and ids is not None and ids.shape[1] != length:
        ids = None  # they are what comes after the embeddings, or a part of them
    past = seen(kwargs)
    if not generating:
        return Prompt(ids, length, past or 0, past == 0)
    if past is None:
        raise AdapterIdsError(
            "an adapter acts from its invocation tokens on, and the cache does not tell how many tokens it holds; "
            "generate without a cache from before."
        )
    # As in transformers: ids shorter than their mask are only what is new.
    mask = kwargs.get("attention_mask")
    new = past > 0 and isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != length
    return Prompt(ids, length, past if new else 0, not new)


def seen(kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens of a row a call's cache holds; None for a cache that does not count them."""
    cache = next((kwargs[name] for name in ("past_key_values", "cache_params") if kwargs.get(name) is not None), None)
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # a recurrent model's state
        return None


def starts_of(
    names: Sequence[str | None],
    invocations: Mapping[str, tuple[int, ...]],
    offsets: Sequence[int | None] | None,
    prompt: Prompt,
) -> tuple[int | None, ...]:
    """From which token of the prompt on each row's adapter acts.

    Args:
        names: the adapter of each row.
        invocations: the invocation tokens of those that are activated by them.
        offsets: as PEFT takes them: how many of each row's last tokens its adapter acts on. None: to be found.
        prompt: the rows' text.

    Returns:
        For each row an index into its prompt, 0 for adapters that always act; None where it does not act.

    Raises:
        AdapterIdsError: the offsets do not fit the rows, or are needed and missing.
    """
    if offsets is not None:
        _check(offsets, names, invocations)
        pairs = zip(names, offsets, strict=True)
        return tuple(
            0 if name not in invocations else None if offset is None else max(0, prompt.length - offset)
            for name, offset in pairs
        )
    return tuple(
        _find(row, name, invocations[name], prompt) if name is not None and name in invocations else 0
        for row, name in enumerate(names)
    )


def last_occurrence(invocation: tuple[int, ...], ids: tuple[int, ...]) -> int | None:
    """Where the last occurrence of the invocation tokens begins; None where they are not."""
    for start in range(len(ids) - len(invocation), -1, -1):
        if ids[start] == invocation[0] and ids[start : start + len(invocation)] == invocation:
            return start
    return None


def _find(row: int, name: str, invocation: tuple[int, ...], prompt: Prompt) -> int | None:
    """Where the last occurrence of the invocation tokens begins in a row."""
    acts = f"row {row}: adapter {name!r} acts from its invocation tokens on"
    if prompt.ids is None:
        raise AdapterIdsError(
            f"{acts}, which are looked for in input_ids; give these beside the embeddings, or {_REMEDY}."
        )
    start = last_occurrence(invocation, tuple(prompt.ids[row].tolist()))
    if start is not None or prompt.whole:
        return start
    raise AdapterIdsError(
        f"{acts}, and they are not among these input_ids, which continue a cache: whether it acted there cannot be "
        f"seen. Give {_REMEDY}."
    )


def _check(
    offsets: Sequence[int | None], names: Sequence[str | None], invocations: Mapping[str, tuple[int, ...]]
) -> None:
    if not isinstance(offsets, Sequence) or isinstance(offsets, str) or len(offsets) != len(names):
        raise AdapterIdsError(f"alora_offsets is {offsets!r} for a batch of {len(names)} rows; give {_REMEDY}.")
    for row, (name, offset) in enumerate(zip(names, offsets, strict=True)):
        if offset is not None and (type(offset) is not int or offset < 1):
            raise AdapterIdsError(f"alora_offsets holds {offset!r}; an entry is a whole number of at least 1, or None.")
        if offset is not None and name not in invocations:
            raise AdapterIdsError(
                f"alora_offsets has {offset} for row {row}, whose adapter {name!r} has no invocation tokens; give None."
            )
