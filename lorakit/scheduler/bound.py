"""The least GPU time that a trace can take, whoever schedules it.

Of any schedule, under the same costs: a forward serves a batch at most, so a token's share of what a forward costs
anyway (the weights, the adapters) is at least one part in `batch`; a row's and its context's costs are its own, and so
are a prompt's. The sum over all tokens is a lower bound on the time in which GPUs compute, and so on that for which they
are paid. Full batches, all of one adapter, all the time, no start, no GPU that waits: no schedule is so good, at any
time to first token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from lorakit.scheduler.costs import Costs
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
    shared = costs.step + costs.lora + costs.rank * min(ranks)
    tokens = decoded = context = prompt = requests = 0
    for one in trace:
        steps = one.new_tokens - 1  # the first token comes with the prompt
        requests += 1
        tokens += one.new_tokens
        decoded += steps
        context += steps * one.prompt_tokens + steps * (steps + 1) // 2
        prompt += one.prompt_tokens
    batches = (tokens * shared + requests * costs.prompts) / limits.batch
    return math.floor(batches) + decoded * costs.row + context * costs.context + prompt * costs.prompt
