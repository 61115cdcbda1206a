"""The tokenizer beside a base, or a sentence that says why there is none."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorakit.errors import BaseModelNotFoundError


def read_tokenizer(base: str, *, remedy: str = "save one beside it") -> PreTrainedTokenizerBase:
    """Reads a base's tokenizer; none of its code is run.

    Args:
        base: a folder or a Hub id.
        remedy: what a user can do where there is none.

    Raises:
        BaseModelNotFoundError: there is none, or it is broken.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # a broken or missing tokenizer makes transformers raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BaseModelNotFoundError(
            f"the base model {base!r} has no tokenizer that can be read ({reason}); {remedy}."
        ) from error
    return tokenizer
