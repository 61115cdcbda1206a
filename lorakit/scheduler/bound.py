"""The least GPU time that a trace can take, in two senses.

`least_gpu_time` is a lower bound for any schedule, however late it answers. Under the same costs a forward serves a
batch at most, so a token's share of what a forward costs anyway (the weights, the adapters) is at least one part in
`batch`, and so is a prompt's of what a forward with prompts costs; a row's, its context's and its prompt tokens' costs
are its own. The sum over all tokens bounds the time in which GPUs compute, and so that for which they are paid.

`clairvoyant_gpu_time` is what a schedule would take that keeps nobody waiting and has to have whole GPUs, but knows all
that comes, starts and stops GPUs in no time and moves requests for nothing: each request begins when it arrives, is
computed at the speed of a full batch, and at every moment the requests in progress fill as few GPUs as hold them. Its
time to first token is a prompt's forward. It is no lower bound: a schedule that lets requests wait could fill the last
GPU better.

Both assume all requests on one adapter, where their adapters cost the least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lorakit.scheduler.costs import SECOND, Costs
from lorakit.scheduler.snapshot import Limits
from lorakit.workloads import Asked


def least_gpu_time(trace: Iterable[Asked], costs: Costs, limits: Limits, ranks: tuple[int, ...] = (16,)) -> int:
    """Picoseconds of GPUs, at least.

    Args:
        trace: the requests.
        costs: what work takes.
        limits: of a replica.
        ranks: of the adapters, see `Hardware`.
    """
    shared = _shared(costs, ranks)
    tokens = decoded = context = prompt = requests = 0
    for one in trace:
        steps = one.new_tokens - 1  # the first token comes with the prompt
        requests += 1
        tokens += one.new_tokens
        decoded += steps
        context += _context(one)
        prompt += one.prompt_tokens
    batches = (tokens * shared + requests * costs.prompts) / limits.batch
    return math.floor(batches) + decoded * costs.row + context * costs.context + prompt * costs.prompt


def clairvoyant_gpu_time(trace: Iterable[Asked], costs: Costs, limits: Limits, ranks: tuple[int, ...] = (16,)) -> int:
    """Picoseconds of GPUs of a schedule that knows all and waits for nothing.

    Args:
        trace: the requests.
        costs: what work takes.
        limits: of a replica.
        ranks: of the adapters, see `Hardware`.
    """
    shared = _shared(costs, ranks)
    changes: list[tuple[int, int]] = []
    for one in trace:
        steps = one.new_tokens - 1
        own = costs.prompts + costs.prompt * one.prompt_tokens + steps * costs.row + _context(one) * costs.context
        arrival = round(one.arrival * SECOND)
        # A full batch's rows are served side by side, so one takes as long as a batch of its like.
        changes += [(arrival, 1), (arrival + one.new_tokens * shared + limits.batch * own, -1)]
    found = running = last = 0
    for time, change in sorted(changes):
        found += (time - last) * -(-running // limits.batch)
        running, last = running + change, time
    return found


def _shared(costs: Costs, ranks: tuple[int, ...]) -> int:
    """What a forward costs whoever is in it, with the least adapter."""
    return costs.step + costs.lora + costs.rank * min(ranks)


def _context(one: Asked) -> int:
    """Tokens that a request's steps look at, summed; its first token comes with the prompt."""
    steps = one.new_tokens - 1
    return steps * one.prompt_tokens + steps * (steps + 1) // 2
