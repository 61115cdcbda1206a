"""Trainable tokens alone: rows of an embedding, and of an output layer that is tied to it.

Source: peft.TrainableTokensConfig; `tokens.py` has the formula.
"""

from __future__ import annotations

import dataclasses

import torch
from peft import TrainableTokensConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods.options import Option, check_config
from lorakit.adapters.methods.parts import parts_of
from lorakit.adapters.methods.tokens import are_tokens, changed, rows_of, with_tied
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError

_ITEM = "trainable_tokens_delta"
_TOKENS = Option("token_indices", lambda value: are_tokens(value) and bool(value), "a list of indices", needed=True)


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a checkpoint of trainable tokens; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(checkpoint, TrainableTokensConfig, [_TOKENS], harmless="init_weights")
    grouped = parts_of(_untied(checkpoint, base), base, "a TRAINABLE_TOKENS", [_ITEM]).modules
    tokens = checkpoint.config["token_indices"]
    rows = {path: rows_of(checkpoint, base, path, tokens, items[_ITEM]) for path, items in grouped.items()}
    modules = {path: changed(checkpoint, base, path, each) for path, each in with_tied(rows, base).items()}
    return AdapterForm("trainable_tokens", modules, dict(checkpoint.config), dict(checkpoint.tensors), True)


def _untied(checkpoint: Checkpoint, base: BaseModel) -> Checkpoint:
    """The checkpoint without the rows that PEFT writes again for each module tied to the embedding."""
    first = checkpoint.tensors.get(f"{base.embedding}.{_ITEM}")
    if first is None:
        return checkpoint
    copies = {f"{path}.{_ITEM}" for path in base.tied}
    for key in copies & checkpoint.tensors.keys():
        if not torch.equal(checkpoint.tensors[key], first):
            raise CheckpointError(
                f"{checkpoint.source}: {key} is tied to the rows of {base.embedding}, but differs from them; save the "
                "adapter again."
            )
    rest = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in copies}
    return dataclasses.replace(checkpoint, tensors=rest)
