"""`lorakit.export`: PEFT checkpoints → a new adapter bank.

The bank appears in one step when all is written: a source that is refused leaves nothing behind.
Knows sources, the base and the bank; knows no device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lorakit.adapters import fingerprint
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.adapters.choices import choices_of
from lorakit.adapters.convert import check_dtype, convert
from lorakit.adapters.folder import check_free
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.names import check_name
from lorakit.adapters.peft_reader import Checkpoint, Source, default_name, describe, read_checkpoint, reading_ahead
from lorakit.adapters.shard import Progress
from lorakit.errors import AdapterExistsError, BankError, BaseModelMismatchError, BaseModelNotFoundError


def export(
    adapters: Mapping[str, Source] | Sequence[Source],
    bank: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | nn.Module | None = None,
    dtype: torch.dtype | None = None,
    svd_energy: float | None = None,
    task_ids: Mapping[str, int] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AdapterBank:
    """Packs PEFT checkpoints of one base model into a new bank.

    Args:
        adapters: name → source; or sources alone, which take their folder's (repository's, PEFT adapter's) name. A
            source is a folder that PEFT saved, a Hub id, or a live `peft.PeftModel`.
        bank: the folder to make.
        base_model: the base that they were trained on, as a folder, a Hub id or a live model. None: the one that
            the first checkpoint names.
        dtype: what A and B are stored in. None: each checkpoint's own, so that `export_peft` gives it back bit for
            bit, and so that its outputs are PEFT's.
        svd_energy: convert also methods that have no exact low-rank form, each module by SVD, with the least rank that
            keeps this share of its change's squared Frobenius norm: above 0 and at most 1, as 0.999. What is lost
            stands in each entry's `svd_errors`. None refuses such methods; what has an exact form stays exact.
        task_ids: name → task, counted from 0, of adapters that have several (Poly).
        overwrite: replace a bank that is there.
        progress: called with each adapter's name and bytes once it is packed.

    Returns:
        The bank, open.

    Raises:
        AdapterNameError, AdapterExistsError: a name that cannot be, or that comes twice.
        BankError: the folder is in use or cannot be written, or there is nothing to export.
        BaseModelNotFoundError: no base given, named or found.
        BaseModelMismatchError: no base given, and the checkpoints name different ones.
        ConfigError: adapters are not kept in this dtype, or svd_energy or task_ids have values that cannot be.
        CheckpointError, UnsupportedMethodError, NonFiniteWeightsError, …: a source that is refused, and why.
    """
    sources = _named(adapters)
    check_dtype(dtype)
    choices = choices_of(sources, svd_energy, task_ids)
    path = Path(bank)
    check_free(path, overwrite)
    first_name, first_source = next(iter(sources.items()))
    first = read_checkpoint(first_source)
    base = _base(base_model, first)

    def make(name: str, source: Source, ask: Callable[[], None]) -> AdapterForm:
        ask()
        checkpoint = first if name == first_name else read_checkpoint(source)
        if base_model is None:
            _check_same_base(first, checkpoint)
        return convert(name, checkpoint, base, dtype, choices[name], check_finite=False)

    with reading_ahead(sources.values()) as ask:
        # Made one at a time, as the bank takes them: a thousand adapters need not fit in memory.
        items = [(name, partial(make, name, source, ask), describe(source)) for name, source in sources.items()]
        return AdapterBank.write(
            path,
            items,
            base_id=base.id,
            fingerprint=fingerprint.fingerprint(base),
            overwrite=overwrite,
            progress=progress,
        )


def _named(adapters: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Name → source, each name checked."""
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
    elif isinstance(adapters, str | bytes) or not isinstance(adapters, Iterable):
        raise BankError(
            f"adapters is a {type(adapters).__name__}; give a list of sources, or a mapping from names to sources."
        )
    else:
        pairs = [(default_name(source), source) for source in adapters]
    if not pairs:
        raise BankError("there is no adapter to export; name at least one PEFT checkpoint.")
    named: dict[str, Source] = {}
    for name, source in pairs:
        check_name(name)
        if name in named:
            raise AdapterExistsError(
                f"two sources would be called {name!r}, {describe(named[name])} and {describe(source)}; "
                "name them apart, as a mapping (`lorakit export NAME=SOURCE`)."
            )
        named[name] = source
    return named


def _base(base_model: str | os.PathLike[str] | nn.Module | None, first: Checkpoint) -> BaseModel:
    named = base_model if base_model is not None else first.config.get("base_model_name_or_path")
    if not named:
        raise BaseModelNotFoundError(
            f"{first.source} does not say which base model it was trained on; give it as base_model (`--base`)."
        )
    if not isinstance(named, str | os.PathLike | nn.Module):
        raise BaseModelNotFoundError(
            f"the base model of {first.source} is given as a {type(named).__name__}; "
            "name a folder or a Hub id with base_model (`--base`), or pass the live model."
        )
    return BaseModel.of(named, task_type=first.config.get("task_type"))


def _check_same_base(first: Checkpoint, other: Checkpoint) -> None:
    named = [checkpoint.config.get("base_model_name_or_path") for checkpoint in (first, other)]
    if named[0] != named[1]:
        raise BaseModelMismatchError(
            f"{other.source} was trained on {named[1]!r}, but {first.source} on {named[0]!r}, and a bank has one base; "
            "if they are the same model, name it with base_model (`--base`)."
        )
