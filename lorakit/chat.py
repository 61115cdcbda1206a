"""Text in, text out: prompts through the tokenizer's chat template, generated ids back to answers.

Knows tokenizers and text; knows no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> BatchEncoding:
    """Prompts as one left-padded batch.

    Args:
        tokenizer: the base's; with a chat template each prompt becomes a user's turn, without one it is plain text.
        prompts: one a row.

    Returns:
        `input_ids` and `attention_mask`, (rows, longest prompt) int64.
    """
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A chat template writes its own special tokens.
    return tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not tokenizer.chat_template,
    )


def decode(tokenizer: PreTrainedTokenizerBase, output_ids: torch.Tensor, prompt_length: int) -> list[str]:
    """The answers in `generate`'s output (rows, prompt_length + new tokens), without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(output_ids[:, prompt_length:], skip_special_tokens=True)]


def each_token(step: Callable[[], Any]) -> StoppingCriteriaList:
    """For `generate(stopping_criteria=…)`: calls `step` after each token, and never stops."""

    class Count(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            step()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([Count()])
