"""What one request asks for, checked before anything is queued."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.errors import RequestError

_MOST_SEQUENCES = 128
_SEEDS = 1 << 64


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be continued.

    Attributes:
        prompt: the prompt's token ids.
        adapter: an adapter's name, or None for the base.
        max_new_tokens: the most tokens that are generated.
        temperature: divides the logits; 0 is greedy.
        top_k: sample among the k most likely tokens; 0: all.
        top_p: sample among the fewest most likely tokens whose probabilities sum to so much.
        seed: the same request with the same seed draws the same tokens, whatever else is in the batch.
        stop_token_ids: tokens that end it; the base's end-of-sequence tokens are among them, unless ignored.
        stop_strings: texts that end it.
        logprobs: whether each token comes with its logarithmic probability, before temperature, top-k and top-p.
        n: how many sequences are drawn.
        deadline: seconds from its submission after which it fails, or None.
        tenant: whose turn it takes.
    """

    prompt: tuple[int, ...]
    adapter: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    logprobs: bool
    n: int
    deadline: float | None
    tenant: str

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _whole("n", self.n, 1, _MOST_SEQUENCES)
        _whole("seed", self.seed, 0, _SEEDS - 1)
        _number("temperature", self.temperature, lambda value: value >= 0, "0 (greedy) or more")
        _number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        if self.deadline is not None:
            _number("deadline", self.deadline, lambda value: value > 0, "seconds, more than 0")
        if not isinstance(self.tenant, str):
            raise RequestError(f"tenant is {self.tenant!r}; give a string.")
        if self.n > 1 and not self.temperature:
            raise RequestError(f"n={self.n} sequences of temperature 0 would all be the same; raise the temperature.")


def token_ids(prompt: object, vocabulary: int) -> tuple[int, ...]:
    """A prompt's ids, checked.

    Args:
        prompt: ids in a sequence or a tensor of one row.
        vocabulary: ids must be below it.

    Raises:
        RequestError: there are none, or something among them is no id.
    """
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.squeeze(0).tolist() if prompt.dim() == 2 and len(prompt) == 1 else prompt.tolist()
    if isinstance(prompt, str | bytes) or (not isinstance(prompt, Sequence) and not hasattr(prompt, "__iter__")):
        raise RequestError(f"the prompt is a {type(prompt).__name__}; give its token ids, as a tokenizer makes them.")
    ids = list(prompt)
    if not ids:
        raise RequestError("the prompt is empty; give at least one token (the tokenizer's bos_token_id).")
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise RequestError(f"the prompt holds {token!r} at {place}; a prompt is a sequence of token ids.")
        token = operator.index(token)
        if not 0 <= token < vocabulary:
            raise RequestError(f"the prompt holds the token {token} at {place}, but ids are 0 to {vocabulary - 1}.")
    return tuple(map(operator.index, ids))


def stop_tokens(stop: object, vocabulary: int) -> frozenset[int]:
    """Tokens that end a request, checked.

    Raises:
        RequestError: something among them is no id.
    """
    if stop is None:
        return frozenset()
    ids = [stop] if isinstance(stop, int) else stop
    return frozenset(token_ids(ids, vocabulary)) if ids else frozenset()


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Texts that end a request, checked.

    Raises:
        RequestError: something among them is no text, or empty.
    """
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in found:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop holds {text!r}; give texts of at least one character.")
    return found


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} is {value!r}; give a whole number, {limits}.")


def _number(name: str, value: Any, allowed: Any, limits: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not allowed(value):
        raise RequestError(f"{name} is {value!r}; give a number, {limits}.")
