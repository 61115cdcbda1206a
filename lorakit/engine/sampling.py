"""The next token of every row, each by its own temperature, top-k, top-p and draw.

A row's draw is one number, uniform in [0, 1): the token is where the cumulative probability passes it (inverse
transform sampling). So a draw depends on its request's seed and its place in the sequence alone, and not on what else
is in the batch; and all of it has static shapes, so that a CUDA graph can keep it.

The tokens that may be drawn are those of transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper
in this order. Where tokens are equally likely and top-p needs but some of them, those with the smaller ids stay.

Knows tensors; no request and no model.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

ROWS = 4
"""Rows of settings, int32 each: temperature, top-p and draw are the bits of float32."""


class Settings(NamedTuple):
    """How a row is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: among the k most likely tokens, and those as likely as the last of them; 0: all. Below 2^31.
        top_p: among the fewest most likely tokens whose probabilities sum to so much; 1: all.
        draw: uniform in [0, 1), counted from the least likely token: there float32 is as fine as probabilities are.
    """

    temperature: float
    top_k: int
    top_p: float
    draw: float


GREEDY = Settings(0.0, 0, 1.0, 0.0)


def draw(seed: str, place: int) -> float:
    """A sequence's number for the token at a place, uniform in [0, 1): the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53  # as many bits as a float has


def rows_of(settings: list[Settings]) -> torch.Tensor:
    """The settings of rows as (`ROWS`, n) int32."""
    columns = list(zip(*settings, strict=True)) or [()] * ROWS
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    # -inf by inf would be NaN.
    tensors[0].clamp_(max=torch.finfo(torch.float32).max)
    return torch.stack([tensor.view(torch.int32) for tensor in tensors])


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, the first of several: (n, V) → (n,) int64."""
    return logits.argmax(dim=-1)


def sample(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A token for each row.

    A row whose logits hold NaN or +inf, or nothing but -inf, gets some token of the vocabulary: what a broken adapter
    computes must not disturb other rows.

    Args:
        logits: (n, V) fp32.
        rows: (`ROWS`, n) int32, of `rows_of`.

    Returns:
        (n,) int64.
    """
    temperature, top_p, draws = (rows[i].view(torch.float32).unsqueeze(1) for i in (0, 2, 3))
    top_k = rows[1].unsqueeze(1)
    is_greedy = temperature == 0
    # In this order, as what is left is always a beginning of it. The first is what argmax gives.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    last = ordered.gather(-1, (top_k.long() - 1).clamp(0, logits.shape[-1] - 1))
    is_left = (top_k == 0) | (ordered >= last)
    # Divided after the largest was subtracted, no temperature makes infinities of finite logits but -inf.
    scaled = (ordered - ordered[:, :1]) / temperature.masked_fill(is_greedy, 1)
    probabilities = scaled.masked_fill(~is_left, float("-inf")).softmax(dim=-1)
    # In fp32, sums over a large vocabulary would leave the least likely tokens no place of their own.
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # The token with which the sum reaches top_p stays.
    is_left = (probabilities > 0) & ((sums - probabilities < top_p) | (top_p == 1))
    end = is_left.sum(dim=-1, keepdim=True).sub_(1).clamp_(min=0)
    target = sums.gather(-1, end) * (1 - draws.double())
    chosen = torch.minimum((sums <= target).sum(dim=-1, keepdim=True), end)
    return order.gather(-1, chosen.masked_fill(is_greedy, 0)).squeeze(-1)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logarithm of each row's token's probability: (n, V) and (n,) → (n,) fp32."""
    return logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
