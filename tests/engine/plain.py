"""A request of which nothing is special."""

from lorakit.engine.request import Request

REQUEST = Request(
    prompt=(1, 2, 3),
    adapter="a",
    max_new_tokens=8,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    stop_token_ids=frozenset(),
    stop_strings=(),
    logprobs=False,
    top_logprobs=0,
    n=1,
    deadline=None,
    tenant="a",
    cache_salt="",
)
