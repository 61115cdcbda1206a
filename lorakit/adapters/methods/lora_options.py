"""The options of a LoRA checkpoint: which are served, which are refused and why, and what each may hold.

An option that changes the mathematics and is not served is refused by name, one of a newer PEFT because it is unknown:
silently wrong output is worse than a refusal. Knows peft.LoraConfig's fields; knows no tensor.
"""

from __future__ import annotations

import dataclasses

from peft import LoraConfig

from lorakit.adapters.methods import alora, bdlora, kasa, pissa
from lorakit.adapters.methods.options import (
    ALPHA_PATTERN,
    RANK_PATTERN,
    TARGETS,
    Option,
    are_names,
    check_config,
    flag,
    is_number,
    is_rank,
    number,
    rank,
    shown,
)
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import UnsupportedMethodError

# Options that change what the adapter computes, and why they are refused.
_REFUSED = {
    "arrow_config": "its router chooses among adapters for every token",
    "layer_replication": "it changes the base's layers, which all tenants share",
    "megatron_config": "its layers are Megatron's, not transformers'",
}
# Ways to initialise that also change the base's weights, in a way that the base and the factors do not give back.
_INITS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
# Ways that leave them alone, besides true and false.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
# Options that do not change what a trained adapter computes: training, initialisation (see _check_init), bookkeeping.
_HARMLESS = "init_lora_weights loftq_config eva_config corda_config lora_ga_config megatron_core ensure_weight_tying"


def check_options(checkpoint: Checkpoint) -> None:
    """Refuses a configuration that the plain formula would be wrong for, or that cannot be meant.

    Raises:
        UnsupportedMethodError: an option that changes what the adapter computes.
        CheckpointError: a value that cannot be.
    """
    # First, as they give reasons where PEFT's own class would only refuse.
    _check_init(checkpoint)
    _check_variants(checkpoint)
    _check_parameters(checkpoint)
    check_config(
        checkpoint,
        LoraConfig,
        _OPTIONS,
        harmless=_HARMLESS,
        refused=_REFUSED,
        empty=["arrow_config"],
        targets=_TARGETS if checkpoint.config.get("target_parameters") else TARGETS,
    )


def _check_init(checkpoint: Checkpoint) -> None:
    """Refuses initialisations that changed the base's weights, but for those of pissa.py."""
    config, source = checkpoint.config, checkpoint.source
    init = config.get("init_lora_weights")
    if pissa.method_of(checkpoint):
        return
    if isinstance(init, str) and init.startswith("pissa_niter_"):
        raise UnsupportedMethodError(
            f"{source}: init_lora_weights={shown(init)}: PEFT's fast SVD depends on a random state that the checkpoint "
            "does not hold. Save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a "
            "plain LoRA."
        )
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
            f"{source}: init_lora_weights={shown(init)} is unknown to this lorakit and may have changed the base's "
            "weights; upgrade lorakit."
        )


def _check_variants(checkpoint: Checkpoint) -> None:
    """Refuses variants together: PEFT does not take them, but for DoRA over PiSSA and OLoRA."""
    config = checkpoint.config
    changes_base = pissa.method_of(checkpoint)
    init = config.get("init_lora_weights")
    chosen = {
        "use_bdlora": bdlora.is_bdlora(checkpoint),
        "use_qalora": config.get("use_qalora"),
        "kasa_config": kasa.is_kasa(checkpoint),
        alora.INVOCATION: alora.is_alora(checkpoint),
        "use_dora": config.get("use_dora") and not changes_base,
        f"init_lora_weights={shown(init)}": changes_base or init == "mica",
    }
    names = [name for name, value in chosen.items() if value]
    if len(names) > 1:
        raise UnsupportedMethodError(f"{checkpoint.source}: {' and '.join(names)} are not served together.")


def _check_parameters(checkpoint: Checkpoint) -> None:
    """Refuses what PEFT does not take beside target_parameters (peft.tuners.lora.layer.ParamWrapper)."""
    config = checkpoint.config
    if not config.get("target_parameters"):
        return
    beside = {
        **{name: config.get(name) for name in "lora_dropout fan_in_fan_out lora_bias use_dora use_qalora".split()},
        "use_bdlora": bdlora.is_bdlora(checkpoint),
        "kasa_config": kasa.is_kasa(checkpoint),
        "init_lora_weights": pissa.method_of(checkpoint),
        alora.INVOCATION: alora.is_alora(checkpoint),
    }
    for name, value in beside.items():
        if value:
            raise UnsupportedMethodError(
                f"{checkpoint.source}: {name}={shown(config[name])} and target_parameters are not served together: "
                "PEFT has no such adapter of a parameter."
            )


# Beside target_parameters there may be no target_modules.
_TARGETS = tuple(
    dataclasses.replace(option, fits=are_names, needed=False) if option.needed else option for option in TARGETS
)
_OPTIONS = (
    rank("r"),
    number("lora_alpha"),
    Option(
        "target_parameters",
        lambda value: are_names(value) and not isinstance(value, str),
        "a list of parameters' names",
    ),
    RANK_PATTERN,
    ALPHA_PATTERN,
    Option("lora_dropout", lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    flag("use_rslora"),
    flag("use_dora"),
    flag("lora_bias"),
    flag("use_qalora"),
    Option("qalora_group_size", is_rank, "a whole number of at least 1"),
    Option("use_bdlora", bdlora.fits, bdlora.WANTED),
    Option("kasa_config", kasa.fits, kasa.WANTED),
    alora.OPTION,
)
