"""Writes a form back as the PEFT checkpoint that it was. The way back from `peft_reader`.

Knows PEFT's files; knows no bank.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from lorakit.adapters.base import BaseModel
from lorakit.adapters.files import TEMPORARY, writing
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import restore
from lorakit.adapters.peft_reader import CONFIG, SAFETENSORS


def write_checkpoint(form: AdapterForm, out: Path, base: Callable[[], BaseModel]) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT's `save_pretrained` does.

    Args:
        form: the adapter, with its extras.
        out: a folder that is empty or not there yet; it appears whole or not at all.
        base: opens its base, which only an adapter that adds tokens to the vocabulary needs.

    Raises:
        BankError: it cannot be written.
        BaseModelNotFoundError: the base is needed and is not there.
    """
    tensors = {key: tensor.contiguous() for key, tensor in restore(form, base).items()}
    config = json.dumps(form.config, indent=2, sort_keys=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}{TEMPORARY}"
    with writing(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            (temporary / CONFIG).write_text(config, encoding="utf-8")
            save_file(tensors, temporary / SAFETENSORS, metadata={"format": "pt"})
            # Takes the place of an empty folder too.
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
