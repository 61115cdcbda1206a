"""A run's folder: what lies in it, whether it is finished, and from where it can go on."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import ConfigError

from .config import FinetuneConfig

_STARTED = "recipe.started.yaml"
_FINISHED = "recipe.yaml"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    In it: `adapter_config.json` and `adapter_model.safetensors` (the PEFT checkpoint), `loss.png`, `recipe.yaml` (the
    settings; written last, so its presence means finished), and while training `recipe.started.yaml` and
    `checkpoints/` (the Trainer's own, to resume from).

    Args:
        path: The folder; need not exist.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def loss_plot(self) -> Path:
        """The loss curve, a PNG file."""
        return self.path / "loss.png"

    def is_finished(self, config: FinetuneConfig) -> bool:
        """Whether a run with these settings is complete here: same digest, readable adapter."""
        if self._digest(_FINISHED) != config.digest():
            return False
        if not all((self.path / name).is_file() for name in _ADAPTER_FILES):
            return False
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / "adapter_model.safetensors", framework="pt") as tensors:
                return len(list(tensors.keys())) > 0
        except (SafetensorError, OSError):
            return False

    def start(self, config: FinetuneConfig) -> Path | None:
        """Readies the folder for a run and finds the checkpoint to go on from.

        Returns:
            The Trainer's newest complete checkpoint of a run with the same settings, or None to start from step 0.

        Raises:
            ConfigError: A run with other settings lies here and `overwrite` is off; nothing is changed then.
        """
        import shutil

        digest = config.digest()
        others = {self._digest(name) for name in (_STARTED, _FINISHED)} - {None, digest}
        foreign = not others and not self._digest(_STARTED) and any((self.path / n).exists() for n in _ADAPTER_FILES)
        foreign = foreign and self._digest(_FINISHED) is None
        if (others or foreign) and not config.overwrite:
            raise ConfigError(
                f"{self.path} holds a run with other settings: choose another output_dir, or set overwrite to true."
            )
        if others or not config.resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        (self.path / _FINISHED).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(_STARTED, config)
        return self._newest_checkpoint()

    def finish(self, config: FinetuneConfig, results: dict[str, Any]) -> None:
        """Marks the run as finished: the settings, their digest and the results go to `recipe.yaml`."""
        import shutil

        self._write(_FINISHED, config, results)
        (self.path / _STARTED).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _newest_checkpoint(self) -> Path | None:
        found: list[tuple[int, Path]] = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            number = folder.name.removeprefix("checkpoint-")
            # The Trainer writes its state last: a folder without it was cut off in the middle.
            if number.isdigit() and (folder / "trainer_state.json").is_file():
                found.append((int(number), folder))
        return max(found)[1] if found else None

    def _digest(self, name: str) -> str | None:
        try:
            values = yaml.safe_load((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return "unreadable"
        return str(values.get("digest")) if isinstance(values, dict) else "unreadable"

    def _write(self, name: str, config: FinetuneConfig, results: dict[str, Any] | None = None) -> None:
        values: dict[str, Any] = {"digest": config.digest(), "config": config.to_dict()}
        if results is not None:
            values["results"] = results
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, self.path / name)
