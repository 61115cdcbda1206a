"""The options of a LoRA checkpoint: which are served, which are refused and why, and what each may hold.

An option that changes the mathematics and is not served is refused by name, one of a newer PEFT because it is unknown:
silently wrong output is worse than a refusal. Knows peft.LoraConfig's fields; knows no tensor.
"""

from __future__ import annotations

from peft import LoraConfig

from lorakit.adapters.methods import bdlora, kasa, pissa
from lorakit.adapters.methods.options import (
    ALPHA_PATTERN,
    RANK_PATTERN,
    Option,
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
    "target_parameters": "its expert parameters need per-expert factors",
    "alora_invocation_tokens": "it acts from its invocation tokens on, which needs per-token routing",
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
    check_config(checkpoint, LoraConfig, _OPTIONS, harmless=_HARMLESS, refused=_REFUSED, empty=["arrow_config"])


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
        "use_dora": config.get("use_dora") and not changes_base,
        f"init_lora_weights={shown(init)}": changes_base or init == "mica",
    }
    names = [name for name, value in chosen.items() if value]
    if len(names) > 1:
        raise UnsupportedMethodError(f"{checkpoint.source}: {' and '.join(names)} are not served together.")


_OPTIONS = (
    rank("r"),
    number("lora_alpha"),
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
)
