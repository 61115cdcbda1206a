"""Checkpoints that visitors bring: files or an archive, put into a folder of their own, and nothing else of it."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from lorakit.errors import CheckpointError

MOST_BYTES = 1 << 30
"""Of a checkpoint, unpacked."""

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_CHUNK = 1 << 20


def unpack(uploaded: Iterable[Path], folder: Path) -> None:
    """Puts a checkpoint's files into a folder; whatever else came with them is left out.

    Args:
        uploaded: the two files of a checkpoint, or one archive that holds them, in a folder or not.
        folder: made here; on an error it is gone.

    Raises:
        CheckpointError: they are not there, or twice, or too large; or the archive is none.
    """
    uploaded = list(uploaded)
    folder.mkdir(parents=True)
    try:
        if [path.suffix.lower() for path in uploaded] == [".zip"]:
            _unpack_zip(uploaded[0], folder)
        else:
            _copy(uploaded, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def name_of(uploaded: Iterable[Path]) -> str:
    """A name for an adapter, after its file; "" if that tells nothing."""
    names = [path.stem for path in uploaded if path.name not in _FILES]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", names[0]).strip("-.")[:64] if len(names) == 1 else ""


def _copy(uploaded: list[Path], folder: Path) -> None:
    found = {path.name: path for path in uploaded}
    if sum(path.stat().st_size for path in uploaded) > MOST_BYTES:
        raise _too_large()
    for name in _FILES:
        if name not in found:
            raise _missing(name)
        shutil.copyfile(found[name], folder / name)


def _unpack_zip(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in _FILES:
                members = [info for info in opened.infolist() if PurePosixPath(info.filename).name == name]
                if not members:
                    raise _missing(name)
                if len(members) > 1:
                    raise CheckpointError(f"the archive holds {name} {len(members)} times; give one checkpoint.")
                _extract(opened, members[0], folder / name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # damaged, or encrypted
        raise CheckpointError(f"{archive.name} cannot be unpacked: {error}. Zip the two files again.") from error


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """What the archive says of a size is not believed."""
    size = 0
    with opened.open(member) as source, target.open("wb") as sink:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > MOST_BYTES:
                raise _too_large()
            sink.write(chunk)


def _missing(name: str) -> CheckpointError:
    return CheckpointError(f"{name} is missing; a PEFT checkpoint is {' and '.join(_FILES)}, or a zip of them.")


def _too_large() -> CheckpointError:
    return CheckpointError(f"the checkpoint is larger than {MOST_BYTES >> 20} MiB, the most that the demo takes.")
