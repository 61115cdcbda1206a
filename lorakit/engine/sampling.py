"""The next token of every row, each by its own temperature, top-k, top-p and draw.

A row's draw is one number, uniform in [0, 1): the token is where the cumulative probability passes it (inverse
transform sampling). So a draw depends on its request's seed and its place in the sequence alone, and not on what else
is in the batch; and all of it has static shapes, so that a CUDA graph can keep it.

Knows tensors; no request and no model.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

ROWS = 4
"""Rows of settings, int32 each: temperature, top-p and draw are the bits of float32."""


class Settings(NamedTuple):
    """How a row is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: among the k most likely tokens; 0: all.
        top_p: among the fewest most likely tokens whose probabilities sum to so much.
        draw: uniform in [0, 1).
    """

    temperature: float
    top_k: int
    top_p: float
    draw: float


GREEDY = Settings(0.0, 0, 1.0, 0.0)


def draw(seed: str, place: int) -> float:
    """A sequence's number for the token at a place, uniform in [0, 1): the same in every process."""
    return random.Random(f"{seed}/{place}").random()


def rows_of(settings: list[Settings]) -> torch.Tensor:
    """The settings of rows as (`ROWS`, n) int32."""
    columns = list(zip(*settings, strict=True)) or [()] * ROWS
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    # Rounded to float32, the largest draws would be 1.
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    tensors[3].clamp_(max=1 - torch.finfo(torch.float32).eps)
    return torch.stack([tensor.view(torch.int32) for tensor in tensors])


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row: (n, V) → (n,) int64."""
    return logits.argmax(dim=-1)


def sample(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A token for each row.

    Args:
        logits: (n, V) fp32.
        rows: (`ROWS`, n) int32, of `rows_of`.

    Returns:
        (n,) int64.
    """
    temperature, top_p, draws = (rows[i].view(torch.float32).unsqueeze(1) for i in (0, 2, 3))
    top_k = rows[1].unsqueeze(1)
    is_greedy = temperature == 0
    ordered, order = logits.div(temperature.masked_fill(is_greedy, 1)).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill((top_k > 0) & (place >= top_k), float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # The most likely token always stays: nothing comes before it.
    probabilities = probabilities.masked_fill((before >= top_p) & (place > 0), 0)
    sums = probabilities.cumsum(dim=-1)
    target = draws * sums[:, -1:]
    # The first whose sum passes the target; by rounding none may, and the last that can be drawn stands in.
    chosen = (sums <= target).sum(dim=-1, keepdim=True)
    chosen = torch.minimum(chosen, (probabilities > 0).sum(dim=-1, keepdim=True) - 1)
    chosen = chosen.masked_fill(is_greedy, 0)
    return order.gather(-1, chosen).squeeze(-1)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logarithm of each row's token's probability: (n, V) and (n,) → (n,) fp32."""
    return logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
