"""aLoRA: a LoRA that acts from its invocation tokens on.

The factors are LoRA's; what differs is on which tokens they act: from the start of the last occurrence of the
invocation tokens in the prompt on (peft.tuners.lora.variants.ALoraLinearVariant). The runtime decides it, from the
tokens that the configuration names.

Source: Greenewald et al. 2025 (arXiv 2504.12397).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.adapters.base import BaseModel
from lorakit.adapters.methods.options import Option, is_whole
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import BankError, UnsupportedMethodError

METHOD = "alora"
INVOCATION = "alora_invocation_tokens"
_MOST_TOKENS = 4096


def is_alora(checkpoint: Checkpoint) -> bool:
    """Whether the configuration names invocation tokens; none at all cannot be meant, and is refused."""
    return checkpoint.config.get(INVOCATION) is not None


def _fits(value: object) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= _MOST_TOKENS and all(map(is_whole, value))


OPTION = Option(INVOCATION, _fits, f"a list of 1 to {_MOST_TOKENS} token ids")


def check(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuses an adapter of a task for which PEFT never lets it act.

    Raises:
        UnsupportedMethodError: naming the task type, or the kind of the base.
    """
    if not is_alora(checkpoint):
        return
    task_type = checkpoint.config.get("task_type")
    if task_type != "CAUSAL_LM":
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {INVOCATION} with task_type={task_type!r} is not served: PEFT looks for the "
            'invocation with task_type "CAUSAL_LM" only, so the adapter never acted in training.'
        )
    if base.is_encoder_decoder:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {INVOCATION} is not served on an encoder-decoder ({base.architecture}): its decoder "
            "has not the tokens that hold the invocation."
        )


def invocation_of(method: str, config: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """The tokens that activate an adapter, or None for one that always acts.

    Args:
        method: its method's short name.
        config: its adapter_config.json, which in a bank may be damaged.
        name: its name, for the message.

    Raises:
        BankError: the configuration is not one that was exported.
    """
    if method != METHOD:
        return None
    tokens = config.get(INVOCATION)
    if not _fits(tokens):
        raise BankError(f"the bank's configuration of adapter {name!r} has no {INVOCATION}; add it again.")
    return tuple(tokens)  # type: ignore[arg-type]
