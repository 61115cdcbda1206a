"""`lorakit.export`: PEFT checkpoints → an adapter bank. And adding to a bank later, by the same way.

The bank is made beside its place and appears there whole: a source that is refused leaves nothing behind.
Knows sources, the base and the bank; knows no device.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lorakit.adapters import fingerprint
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.damage import Progress
from lorakit.adapters.names import check_name
from lorakit.adapters.peft_reader import Checkpoint, Source, default_name, describe, read_checkpoint
from lorakit.errors import AdapterExistsError, BankError, BaseModelNotFoundError


def export(
    adapters: Mapping[str, Source] | Sequence[Source],
    bank: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | nn.Module | None = None,
    dtype: torch.dtype | None = None,
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
            bit; the runtime casts to the base's when it loads.
        overwrite: replace a bank that is there.
        progress: called with each adapter's name and bytes once it is packed.

    Returns:
        The bank, open.

    Raises:
        AdapterNameError, AdapterExistsError: a name that cannot be, or that comes twice.
        BankError: the folder is in use.
        BaseModelNotFoundError: no base given, named or found.
        CheckpointError, UnsupportedMethodError, NonFiniteWeightsError, …: a source that is refused, and why.
    """
    sources = _named(adapters)
    path = Path(bank)
    _check_target(path, overwrite)
    base = _base(base_model, read_checkpoint(next(iter(sources.values()))))
    # Made one at a time, as the bank takes them: a thousand adapters need not fit in memory.
    items = [(name, partial(convert, name, source, base, dtype), describe(source)) for name, source in sources.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        fresh = AdapterBank.create(Path(folder) / "bank", base_id=base.id, fingerprint=fingerprint.fingerprint(base))
        fresh.add_forms(items, progress=progress)
        _move(Path(folder) / "bank", path)
    return AdapterBank.open(path)


def _named(adapters: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """Name → source, each name checked."""
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
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


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    if not (path / "bank.json").is_file():
        raise BankError(f"{path} is there already and is no bank; choose another folder.")
    if not overwrite:
        raise BankError(
            f"{path} holds a bank already; add to it with AdapterBank.from_pretrained({str(path)!r}).add(name, source) "
            "(`lorakit export --add`), or replace it with overwrite=True (`--overwrite`)."
        )


def _base(base_model: str | os.PathLike[str] | nn.Module | None, first: Checkpoint) -> BaseModel:
    named = base_model if base_model is not None else first.config.get("base_model_name_or_path")
    if not named:
        raise BaseModelNotFoundError(
            f"{first.source} does not say which base model it was trained on; give it as base_model (`--base`)."
        )
    return BaseModel.of(named, task_type=first.config.get("task_type"))


def _move(fresh: Path, path: Path) -> None:
    """Puts the fresh bank in place of what is there."""
    if path.exists():
        old = fresh.parent / "old"
        os.replace(path, old)
        try:
            os.replace(fresh, path)
        except OSError:
            os.replace(old, path)
            raise
        shutil.rmtree(old)
    else:
        os.replace(fresh, path)
