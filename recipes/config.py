"""The settings of one fine-tuning run, and how they are read from YAML."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lorakit.errors import ConfigError

# Where a run writes and what it does with an older run there change nothing in the weights.
_NOT_IN_DIGEST = frozenset({"output_dir", "overwrite", "resume", "save_steps", "logging_steps"})


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of one fine-tuning run: one tenant, one adapter. Checked when made; see `from_yaml`.

    Data: name exactly one of `task` and `train_file`.

    Args:
        output_dir: Folder of the run. It becomes a PEFT checkpoint.
        base_model: Hub id or local folder. The default is SmolLM2-135M-Instruct, which `lorakit.embedded` also finds
            without the Hub.
        task: One of `lorakit.recipes.tasks.task_names()`.
        train_size: Rows generated for `task`.
        train_file: A JSON Lines file, each line `{"prompt": ..., "completion": ...}` or `{"messages": [...]}`.
        max_length: Longest sequence, in tokens. A longer row is an error, never cut: a completion cut short teaches
            the wrong answer.
        rank: LoRA's r.
        alpha: LoRA's alpha; the update is scaled by alpha / rank (alpha / √rank with `use_rslora`).
        dropout: Dropout before LoRA's A, 0 ≤ dropout < 1.
        target_modules: `"all-linear"` (every Linear but the head), or a list of module names.
        layers: How many of the last decoder layers get an adapter; `"all"`; or `"auto"`: all on a GPU, the last third
            on a CPU, where the backward pass then ends early.
        use_dora: DoRA: a learned magnitude beside LoRA's direction.
        use_rslora: Rank-stabilised scale.
        use_qlora: Base weights in 4 bits (NF4) while training; needs the package bitsandbytes and a GPU.
        learning_rate: Peak of the schedule: about ten times what full fine-tuning takes.
        lr_scheduler: transformers' name of the schedule, such as `"cosine"`, `"linear"`, `"constant"`.
        warmup_ratio: Share of all steps in which the learning rate rises from 0, 0 ≤ ratio < 1.
        weight_decay: AdamW's weight decay.
        batch_size: Rows a step and device.
        gradient_accumulation: Batches an optimizer step.
        epochs: Passes over the data; may be a fraction.
        max_steps: Optimizer steps; replaces `epochs` when given.
        seed: Seeds the data, the adapter's initial weights and the order of rows.
        device: `"auto"` (a GPU if there is one), `"cpu"` or `"cuda"`.
        dtype: Of the base and the computation: `"auto"` (bfloat16 on a GPU that has it, else float32), `"float32"` or
            `"bfloat16"`. Adapters are trained and saved in float32 either way, but under QLoRA, where TRL takes
            bfloat16.
        gradient_checkpointing: Less memory for about a third more time.
        save_steps: A checkpoint to resume from every so many steps.
        logging_steps: The loss is recorded every so many steps.
        resume: Continue an interrupted run of the same settings from its last checkpoint.
        overwrite: Replace a run with other settings in `output_dir` instead of refusing.

    Raises:
        ConfigError: A value that cannot be; the message names the key and the remedy.
    """

    output_dir: Path
    base_model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"

    task: str | None = None
    train_size: int = 160
    train_file: Path | None = None
    max_length: int = 1024

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    layers: Literal["auto", "all"] | int = "auto"
    use_dora: bool = False
    use_rslora: bool = False
    use_qlora: bool = False

    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    batch_size: int = 4
    gradient_accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    seed: int = 0

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False

    save_steps: int = 50
    logging_steps: int = 1
    resume: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for key, kind in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, key, _checked(key, getattr(self, key), kind))
        self._check_ranges()
        if (self.task is None) == (self.train_file is None):
            raise ConfigError("Give exactly one of task (a built-in task) and train_file (your own JSON Lines file).")
        if self.use_qlora and self.device == "cpu":
            raise ConfigError("use_qlora needs a GPU: set device to cuda, or use_qlora to false.")

    def _check_ranges(self) -> None:
        for key in (
            "train_size", "max_length", "rank", "batch_size", "gradient_accumulation", "save_steps", "logging_steps",
        ):  # fmt: skip
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}: give a whole number of at least 1.")
        for key in ("alpha", "learning_rate", "epochs"):
            # Written so that NaN fails too.
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"{key} is {getattr(self, key)}: give a finite number above 0.")
        for key in ("dropout", "warmup_ratio"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}: give a number from 0 up to, but not, 1.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"weight_decay is {self.weight_decay}: give a number of at least 0.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps is {self.max_steps}: give a whole number of at least 1, or leave it out.")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ConfigError(f"layers is {self.layers}: give a whole number of at least 1, 'all' or 'auto'.")
        if not self.target_modules:
            raise ConfigError("target_modules is empty: name at least one module, or use 'all-linear'.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FinetuneConfig":
        """Makes a config from plain values.

        Raises:
            ConfigError: An unknown key (the message suggests the nearest), a missing `output_dir`, a bad value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"Unknown key {key!r}.{_nearest(str(key), known)}")
        if "output_dir" not in values:
            raise ConfigError("output_dir is missing: name the folder that the run shall write.")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "FinetuneConfig":
        """Reads a config file. A relative `train_file` is looked for beside the config file.

        `output_dir` is relative to the working folder, as for any command.

        Raises:
            ConfigError: The file cannot be read, is no YAML mapping, or holds a bad key or value.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no mapping: write one 'key: value' a line.")
        if isinstance(values.get("train_file"), str):
            values["train_file"] = path.parent / values["train_file"]
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values that YAML and JSON can hold; `from_dict` reads them back."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }

    def digest(self) -> str:
        """SHA-256 (hex) over all that decides the weights: settings and the training file's bytes.

        Two runs with the same digest would train the same adapter, so a finished one can be reused.

        Raises:
            ConfigError: `train_file` cannot be read.
        """
        values = {key: value for key, value in self.to_dict().items() if key not in _NOT_IN_DIGEST}
        if self.train_file is not None:
            try:
                values["train_file"] = hashlib.sha256(self.train_file.read_bytes()).hexdigest()
            except OSError as error:
                raise ConfigError(f"train_file {self.train_file} cannot be read: {error}") from error
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(known)}."


def _checked(key: str, value: Any, kind: Any) -> Any:
    """The value in its field's type, or ConfigError. Only conversions that lose nothing are made."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) or _is_union(kind) else (kind,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif option is type(None):
            if value is None:
                return None
        elif option is Path:
            if isinstance(value, str | Path) and str(value):
                return Path(value)
        elif typing.get_origin(option) is list:
            if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
                return value
        elif option is float:
            number = _number(value)
            if number is not None:
                return number
        elif option is int:
            # bool is an int to Python, never to a person.
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif isinstance(value, option):
            return value
    wanted = " or ".join(_describe(option) for option in options)
    raise ConfigError(f"{key} is {value!r}: give {wanted}.")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Union


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    # YAML 1.1 reads 1e-3, without a dot, as a string.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _describe(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(option))
    if typing.get_origin(option) is list:
        return "a list of names"
    names = {Path: "a path", str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(option, "nothing")
