"""The next token of every row, each by its own temperature, top-k, top-p and draw.

A row's draw is one number, uniform in [0, 1): the token is where the cumulative probability passes it (inverse
transform sampling), in the order of the vocabulary, or of probability where top-k or top-p cut the row. So a draw
depends on its request's seed and its place in the sequence alone, and not on what else is in the batch; and all of it
has static shapes, so that nobody waits for the device.

On a GPU, `lorakit_kernels.sample` does it, without sorting the vocabulary.

The tokens that may be drawn are those of transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper
in this order. Where tokens are equally likely and top-p needs but some of them, those with the smaller ids stay.

Knows tensors; no request and no model.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from lorakit.runtime import ops

ROWS = 5
"""Rows of settings, int32 each: temperature, top-p, and the two parts of the draw are the bits of float32."""


MOST_LIKELY = 20
"""Tokens of a place that can be told beside the one that was drawn: as many as OpenAI's API gives."""


class Settings(NamedTuple):
    """How a row is drawn.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: among the k most likely tokens, and those as likely as the last of them; 0: all. Below 2^31.
        top_p: among the fewest most likely tokens whose probabilities sum to so much; 1: all.
        draw: uniform in [0, 1).
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
    columns = list(zip(*settings, strict=True)) or [()] * len(Settings._fields)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float64)
    *tensors, draws = (torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))
    # Some devices take what is below the normal numbers for 0, and -inf by inf would be NaN.
    limits = torch.finfo(torch.float32)
    tensors[0] = torch.where(tensors[0] > 0, tensors[0].clamp(limits.tiny, limits.max), 0.0)
    # In two parts, as one float32 is too coarse for tokens that are not likely.
    tensors += [draws.float(), (draws - draws.float()).float()]
    return torch.stack([tensor.view(torch.int32) for tensor in tensors])


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each row, the first of several: (n, V) → (n,) int64."""
    return logits.argmax(dim=-1)


def sample(logits: torch.Tensor, rows: torch.Tensor, *, cuts: bool = True) -> torch.Tensor:
    """A token for each row.

    A row whose logits hold NaN or +inf, or nothing but -inf, gets some token of the vocabulary: what a broken adapter
    computes must not disturb other rows.

    Args:
        logits: (n, V) fp32.
        rows: (`ROWS`, n) int32, of `rows_of`.
        cuts: whether some row has a top-k or a top-p. Only these need the vocabulary in order, and finding that takes
            longer than all else; what other rows get is the same either way.

    Returns:
        (n,) int64.
    """
    if ops.has_kernels(logits.device, logits.dtype):
        temperature, top_p, draws, rests = (rows[i].view(torch.float32) for i in (0, 2, 3, 4))
        return ops.sample(logits, temperature, rows[1], top_p, draws, rests, cuts=cuts)
    return by_sorting(logits, rows, cuts=cuts)


def by_sorting(logits: torch.Tensor, rows: torch.Tensor, *, cuts: bool) -> torch.Tensor:
    """`sample`, in plain torch; arguments as there."""
    temperature, top_p, draws, rests = (rows[i].view(torch.float32).unsqueeze(1) for i in (0, 2, 3, 4))
    top_k = rows[1].unsqueeze(1)
    is_greedy = temperature == 0
    most_likely = greedy(logits).unsqueeze(1)
    # Divided after the largest was subtracted, no temperature makes infinities of finite logits but -inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.masked_fill(is_greedy, 1)
    draws = draws.double() + rests.double()
    chosen = _drawn(scaled.softmax(dim=-1), draws)
    if cuts:
        is_cut = ((top_k > 0) & (top_k < logits.shape[-1])) | (top_p < 1)
        chosen = torch.where(is_cut, _drawn_of_likely(scaled, top_k, top_p, draws), chosen)
    return torch.where(is_greedy, most_likely, chosen).squeeze(-1)


def _drawn(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Where the sum of the probabilities passes the draw: (n, V) and (n, 1) → (n, 1)."""
    # In fp32, sums over a large vocabulary would leave the least likely tokens no place of their own.
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    # A token of probability 0 adds nothing, so the sum never stops there; nor behind the last that adds something.
    return torch.minimum((sums <= draws * total).sum(dim=-1, keepdim=True), (sums < total).sum(dim=-1, keepdim=True))


def _drawn_of_likely(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """The same among the most likely tokens."""
    # In this order, as what is left is always a beginning of it.
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    last = ordered.gather(-1, (top_k.long() - 1).clamp(0, scaled.shape[-1] - 1))
    is_left = (top_k == 0) | (ordered >= last)
    probabilities = ordered.masked_fill(~is_left, float("-inf")).softmax(dim=-1)
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    # The token with which the sum reaches top_p stays.
    is_left = (probabilities > 0) & ((sums - probabilities < top_p) | (top_p == 1))
    end = is_left.sum(dim=-1, keepdim=True).sub_(1).clamp_(min=0)
    target = sums.gather(-1, end) * (1 - draws)
    chosen = torch.minimum((sums <= target).sum(dim=-1, keepdim=True), end)
    return order.gather(-1, chosen)


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """The most likely tokens of each row, and the logarithms of their probabilities.

    Args:
        logits: (n, V) fp32.

    Returns:
        (2, `MOST_LIKELY` or V if that is less, n) int32: tokens, and the bits of fp32.
    """
    found = logits.log_softmax(dim=-1).topk(min(MOST_LIKELY, logits.shape[-1]), dim=-1)
    return torch.stack([found.indices.int(), found.values.view(torch.int32)]).transpose(1, 2)


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logarithm of each row's token's probability: (n, V) and (n,) → (n,) fp32."""
    return logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
