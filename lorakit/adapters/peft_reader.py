"""Reads a PEFT checkpoint: a folder, a Hub id or a live `PeftModel` → its configuration and its tensors.

Says what is wrong with a checkpoint before anything is converted. Knows PEFT's files and keys; knows no method's
mathematics (methods/) and no base model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lorakit.adapters.dtypes import SAFETENSORS_DTYPES, WEIGHT_DTYPES
from lorakit.errors import CheckpointError

if TYPE_CHECKING:
    Source: TypeAlias = str | os.PathLike[str] | PeftModel
else:
    Source = Any

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."

# What PEFT keeps once for all modules. Anything else outside the prefix is no checkpoint of PEFT's.
_SHARED = re.compile(
    r"base_model\.(p?vera_[AB]|vblora_vector_bank|unilora_theta_d|tinylora_v\.[0-9]+|randlora_[AB]"
    r"|frod_(V|s_indices|s_size)\.\w+)"
)
_INDICES = re.compile(
    r"(_topk_indices|\.(unilora_indices_[AB]|shira_indices|supertuning_indices|frod_s_(indices|size)\.\w+))\Z"
)
"""What keys end with whose tensors are whole numbers."""
_WHOLE = (torch.uint8, torch.int16, torch.int32, torch.int64)
_AHEAD = 2  # Checkpoints that the system reads ahead.


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A PEFT checkpoint as it was saved.

    Attributes:
        source: where it came from, for messages and for the bank's record.
        config: adapter_config.json.
        tensors: PEFT key without the leading "base_model.model." → tensor; the key is whole where the tensor belongs
            to no module ("base_model.vera_A").
    """

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def peft_type(self) -> str:
        """PEFT's type in capitals, for example "LORA"."""
        return str(self.config["peft_type"]).upper()


def read_checkpoint(source: Source) -> Checkpoint:
    """Reads a checkpoint.

    Args:
        source: a folder that PEFT's `save_pretrained` wrote, a Hub id, or a live `PeftModel` (its active adapter).

    Raises:
        CheckpointError: nothing there, no or broken configuration, no weights, truncated or unsafe weights, or keys
            that PEFT does not write.
    """
    if isinstance(source, PeftModel):
        return _read_live(source)
    if not isinstance(source, str | os.PathLike) or not str(source):
        shown = repr(source) if source is None or isinstance(source, str | int) else f"a {type(source).__name__}"
        raise CheckpointError(f"{shown} is no adapter's source; give a folder, a Hub id or a live PeftModel.")
    try:
        return _read_folder(_locate(str(source)), describe(source))
    except OSError as error:
        raise CheckpointError(
            f"{source} cannot be read: {_reason(error)}. Check the path and its permissions."
        ) from error


def full_key(key: str) -> str:
    """The key of one of a checkpoint's tensors in PEFT's file."""
    return key if _SHARED.fullmatch(key) else PREFIX + key


def default_name(source: Source) -> str:
    """The name that a list of sources gives an adapter: its folder's, its repository's, or its PEFT name."""
    if isinstance(source, PeftModel):
        return str(source.active_adapter)
    # Absolute, so that "." has its folder's name.
    return Path(os.path.abspath(str(source))).name


def describe(source: Source) -> str:
    """A source in a few words, for messages and for the bank's record."""
    return f"PeftModel:{source.active_adapter}" if isinstance(source, PeftModel) else str(source)


def _read_live(model: PeftModel) -> Checkpoint:
    source = describe(model)
    active = list(getattr(model.base_model, "active_adapters", [model.active_adapter]))
    if active != [model.active_adapter]:
        raise CheckpointError(
            f"{source}: {active} are active together, and their sum is no adapter; call set_adapter with one of them."
        )
    name = str(model.active_adapter)
    try:
        # Through PEFT's own writer: what a live model gives is what its saved checkpoint would give.
        with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
            model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
            checkpoint = _read_folder(Path(folder) if name == "default" else Path(folder) / name, source)
    except OSError as error:
        raise CheckpointError(
            f"{source}: its temporary copy cannot be written: {_reason(error)}. Free space there, or set TMPDIR."
        ) from error
    # PEFT sorts them when it saves, but the first that matches counts.
    live = model.peft_config[name]
    patterns = {key: dict(getattr(live, key)) for key in ("rank_pattern", "alpha_pattern") if getattr(live, key, None)}
    return dataclasses.replace(checkpoint, config={**checkpoint.config, **patterns})


def _locate(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise CheckpointError(f"{source} is a file; name the folder that holds it and its {CONFIG}.")
    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, SAFETENSORS, PICKLE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source!r} is neither a folder here nor a repository that the Hub gave ({type(error).__name__}). "
            "Check its spelling, the network and your access to it."
        ) from error


def _read_folder(folder: Path, source: str) -> Checkpoint:
    config = _read_config(folder, source)
    tensors = _read_tensors(folder, source)
    if not tensors:
        raise CheckpointError(f"{source}: the checkpoint holds no tensor.")
    strangers = [key for key in tensors if not key.startswith(PREFIX) and not _SHARED.fullmatch(key)]
    if strangers:
        raise CheckpointError(
            f"{source}: {len(strangers)} keys do not begin with {PREFIX!r}, for example {strangers[0]!r}: "
            "this is not a checkpoint as PEFT's save_pretrained writes it."
        )
    for key, tensor in tensors.items():
        if tensor.dtype not in (_WHOLE if _INDICES.search(key) else WEIGHT_DTYPES):
            raise CheckpointError(
                f"{source}: {key} is {str(tensor.dtype).removeprefix('torch.')}; "
                "save the adapter as float32, bfloat16 or float16."
            )
    return Checkpoint(source, config, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        nested = sorted(child.name for child in folder.iterdir() if (child / CONFIG).is_file())
        remedy = f"its subfolders {nested} do: name one of them" if nested else "name a folder that PEFT saved to"
        raise CheckpointError(f"{source} holds no {CONFIG}; {remedy}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {CONFIG} is not readable as JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{source}: {CONFIG} names no peft_type; it is not a PEFT configuration.")
    return config


def _read_tensors(folder: Path, source: str) -> dict[str, torch.Tensor]:
    if (folder / SAFETENSORS).is_file():
        _read_ahead(folder / SAFETENSORS)
        try:
            return _map_safetensors(folder / SAFETENSORS)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{source}: {SAFETENSORS} is damaged or truncated: {error}.") from error
    if (folder / PICKLE).is_file():
        return _read_pickle(folder / PICKLE, source)
    raise CheckpointError(f"{source} holds neither {SAFETENSORS} nor {PICKLE}; save the adapter there again.")


@contextmanager
def reading_ahead(sources: Iterable[Source]) -> Iterator[Callable[[], None]]:
    """Has the system read the files of checkpoints that will be read, while other work goes on.

    They are mapped, and page faults would wait for the disk. A thread asks for them, as asking can wait too.

    Args:
        sources: in the order in which they will be read; those that are no folder are left out.

    Yields:
        To be called when one of them is read: the next but one is asked for.
    """
    waiting = iter(sources)
    with ThreadPoolExecutor(1, thread_name_prefix="lorakit-read") as reader:

        def ask(count: int = 1) -> None:
            for source in islice(waiting, count):
                if isinstance(source, str | os.PathLike):
                    reader.submit(_read_ahead, Path(source) / SAFETENSORS)

        ask(_AHEAD)
        try:
            yield ask
        finally:
            reader.shutdown(cancel_futures=True)


def _read_ahead(path: Path) -> None:
    """Has the system read a file."""
    if hasattr(os, "posix_fadvise"):  # not on every system
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """What `load_file` gives, in a sixth of its time: the library checks the header, and one mapping holds all tensors.

    As the library's own, the mapping is private: the file is read when a tensor is, and must not be cut meanwhile.
    """
    with safe_open(path, framework="pt") as file:
        # A file has no holes, so sizes say where tensors lie.
        parts = [(key, file.get_slice(key)) for key in file.offset_keys()]
    entries = [(key, (part.get_dtype(), tuple(part.get_shape()))) for key, part in parts]
    kinds = {kind for _, kind in entries}  # a few for many tensors
    if any(code not in SAFETENSORS_DTYPES for code, _ in kinds):
        return load_file(path)
    facts = {
        (code, shape): (dtype := SAFETENSORS_DTYPES[code], prod(shape) * dtype.itemsize, _strides(shape))
        for code, shape in kinds
    }
    with open(path, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        nbytes = os.fstat(opened.fileno()).st_size
    if nbytes != start + sum(facts[kind][1] for _, kind in entries):
        raise ValueError("it changed while it was read")
    data = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8)
    # Each call of torch's for a tensor costs as much as copying kilobytes of it: one of them, where one will do.
    dtypes = {dtype for dtype, _, _ in facts.values()}
    wholes = {dtype: data[: nbytes - nbytes % dtype.itemsize].view(dtype) for dtype in dtypes}
    tensors = {}
    for key, kind in entries:
        (_, shape), (dtype, size, strides) = kind, facts[kind]
        place, rest = divmod(start, dtype.itemsize)
        # The format aligns nothing; torch does.
        tensors[key] = (
            data[start : start + size].clone().view(dtype).view(shape)
            if rest
            else wholes[dtype].as_strided(shape, strides, place)
        )
        start += size
    return tensors


def _strides(shape: tuple[int, ...]) -> list[int]:
    """The steps of a tensor in row-major order."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return steps[::-1] if shape else []


def _read_pickle(path: Path, source: str) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make it raise nearly anything
        raise CheckpointError(
            f"{source}: {path.name} is a pickle that does not load with weights_only=True: it is damaged, or may run "
            f"code. Save it again as {SAFETENSORS} with a current PEFT."
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise CheckpointError(f"{source}: {path.name} is not a mapping from keys to tensors; save the adapter again.")
    for key, value in loaded.items():
        # Also none that takes more memory than the file has bytes, as an expanded view of a few can.
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu" or not _is_stored(value):
            raise CheckpointError(f"{source}: {key} in {path.name} is no plain tensor; save the adapter again.")
    return {key: value.detach().contiguous() for key, value in loaded.items()}


def _is_stored(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
