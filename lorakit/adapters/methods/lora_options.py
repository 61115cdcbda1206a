"""The options of a LoRA checkpoint: which are served, which are refused and why, and what each may hold.

An option that changes the mathematics and is not served is refused by name, one of a newer PEFT because it is unknown:
silently wrong output is worse than a refusal. Knows peft.LoraConfig's fields; knows no tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig

from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, UnsupportedMethodError

# Options that change what the adapter computes, and why they are refused.
_REFUSED = {
    "modules_to_save": "whole saved modules are not part of a low-rank form",
    "trainable_token_indices": "replaced embedding rows are not part of a low-rank form",
    "target_parameters": "its expert parameters need per-expert factors",
    "alora_invocation_tokens": "it acts from its invocation tokens on, which needs per-token routing",
    "use_bdlora": "its block-diagonal factors are packed",
    "use_qalora": "its A acts on pooled inputs",
    "kasa_config": "it truncates the base's weights",
    "arrow_config": "its router chooses among adapters for every token",
    "layer_replication": "it changes the base's layers, which all tenants share",
    "megatron_config": "its layers are Megatron's, not transformers'",
}
# Ways to initialise that also change the base's weights: the factors alone do not give the trained model.
_INITS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
# Ways that leave them alone, besides true and false.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Options that do not change what a trained adapter computes: training, initialisation, bookkeeping, or read above.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision peft_type peft_version task_type inference_mode r lora_alpha "
    "target_modules exclude_modules layers_to_transform layers_pattern lora_dropout fan_in_fan_out bias use_rslora "
    "init_lora_weights rank_pattern alpha_pattern use_dora lora_bias loftq_config eva_config corda_config "
    "lora_ga_config megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)


def check_options(checkpoint: Checkpoint) -> None:
    """Refuses a configuration that the plain formula would be wrong for, or that cannot be meant.

    Raises:
        UnsupportedMethodError: an option that changes what the adapter computes.
        CheckpointError: a value that cannot be.
    """
    _refuse_unsupported(checkpoint)
    _check_fields(checkpoint)


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Refuses every option that would make the plain formula wrong, unknown ones included."""
    config, source = checkpoint.config, checkpoint.source
    for option, reason in _REFUSED.items():
        if config.get(option):
            raise UnsupportedMethodError(f"{source}: {option} is not served: {reason}.")
    init = config.get("init_lora_weights")
    for prefix, name in _INITS.items():
        if isinstance(init, str) and init.lower().startswith(prefix):
            raise UnsupportedMethodError(
                f"{source}: init_lora_weights={init!r}: {name} also changed the base's weights when training began. "
                "Save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA."
            )
    if isinstance(init, str) and init.lower() == "loftq":
        raise UnsupportedMethodError(
            f"{source}: init_lora_weights={init!r}: LoftQ gave the adapter a quantised base of its own, which no other "
            "tenant shares; train without it."
        )
    plain = isinstance(init, str) and init.lower() in _PLAIN_INITS
    if init is not None and not isinstance(init, bool) and not plain:
        raise UnsupportedMethodError(
            f"{source}: init_lora_weights={_shown(init)} is unknown to this lorakit and may have changed the base's "
            "weights; upgrade lorakit."
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedMethodError(
            f"{source}: bias={_shown(config['bias'])} replaces the base's biases, which is not served; "
            "train with bias='none', or lora_bias=True for a bias of the adapter's own."
        )
    # An option of a newer PEFT may change the mathematics: silently wrong output is worse than a refusal.
    unknown = sorted(key for key, value in config.items() if value and key not in _HARMLESS | _REFUSED.keys())
    if unknown:
        raise UnsupportedMethodError(
            f"{source}: adapter_config.json sets options that this lorakit does not know ({', '.join(unknown)}), "
            "so it cannot promise PEFT's outputs; upgrade lorakit."
        )


def _is_whole(value: object, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 31


def _is_number(value: object) -> bool:
    # The scale multiplies in fp32. The comparison refuses NaN too, and compares integers of any size.
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]


def _are_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _maps_to(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and fits(each) for key, each in value.items())


def _is_rank(value: object) -> bool:
    return _is_whole(value, least=1)


# What the conversion reads: field, its test, and what it should be. Where a field is not needed, it may be null.
_FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("r", _is_rank, "a whole number of at least 1"),
    ("lora_alpha", _is_number, "a number that fp32 can hold"),
    ("target_modules", lambda value: _are_names(value) and bool(value), "a pattern or a list of modules' names"),
    ("rank_pattern", lambda value: _maps_to(value, _is_rank), "a mapping from patterns to whole numbers"),
    ("alpha_pattern", lambda value: _maps_to(value, _is_number), "a mapping from patterns to numbers"),
    ("exclude_modules", _are_names, "a pattern or a list of modules' names"),
    (
        "layers_to_transform",
        lambda value: _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value))),
        "a layer's number or a list of them",
    ),
    ("layers_pattern", _are_names, "a name or a list of names"),
    ("lora_dropout", lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    ("use_rslora", lambda value: isinstance(value, bool), "true or false"),
    ("use_dora", lambda value: isinstance(value, bool), "true or false"),
    ("lora_bias", lambda value: isinstance(value, bool), "true or false"),
)
_NEEDED = ("r", "lora_alpha", "target_modules")


def _check_fields(checkpoint: Checkpoint) -> None:
    """Refuses a configuration that cannot be meant: by what is read here, and by PEFT's own rules."""
    config, source = checkpoint.config, checkpoint.source
    for field, fits, wanted in _FIELDS:
        value = config.get(field)
        if not fits(value) if value is not None else field in _NEEDED:
            found = _shown(value) if field in config else "missing"
            raise CheckpointError(
                f"{source}: {field} of adapter_config.json is {found}, but should be {wanted}; save the adapter again."
            )
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    try:
        LoraConfig(**{key: value for key, value in config.items() if key in known})
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{source}: PEFT does not take this adapter_config.json: {error}. Save the adapter again."
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
