"""What one request asks for, checked before anything is queued."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from lorakit.engine.checks import number, shown, whole, yes_or_no
from lorakit.engine.sampling import MOST_LIKELY
from lorakit.errors import RequestError
from lorakit.runtime.prompts import last_occurrence
from lorakit.runtime.roster import Adapter

_MOST_SEQUENCES = 128
_MOST_SEED = (1 << 64) - 1
_MOST_TOP_K = (1 << 31) - 1
_MOST_STOPS = 64
_LONGEST_STOP = 512
"""Bytes of a stop string: for each token that many tokens are decoded."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be continued.

    Attributes:
        prompt: the prompt's token ids.
        adapter: an adapter's name, or None for the base.
        max_new_tokens: the most tokens that are generated.
        temperature: divides the logits; 0 is greedy.
        top_k: sample among the k most likely tokens, and those as likely as the last of them; 0: all.
        top_p: sample among the fewest most likely tokens whose probabilities sum to so much.
        seed: the same request with the same seed draws the same tokens, whatever else is in the batch.
        stop_token_ids: tokens that end it; the base's end-of-sequence tokens are among them, unless ignored.
        stop_strings: texts that end it.
        logprobs: whether each token comes with its logarithmic probability, before temperature, top-k and top-p.
        top_logprobs: so many of the most likely tokens come with each token, with theirs.
        n: how many sequences are drawn.
        deadline: seconds from its submission after which it fails, or None.
        tenant: whose turn it takes.
        cache_salt: only requests of the same salt share blocks of the prefix cache with it.
        streamed: tokens that another engine has generated for it: it goes on behind them. They are among its new
            tokens, and are not given again.
        drawn_as: of a request whose sequences are served apart, which one this is; it is drawn as there.
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
    top_logprobs: int
    n: int
    deadline: float | None
    tenant: str
    cache_salt: str
    streamed: tuple[int, ...] = ()
    drawn_as: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, object] = {
            "max_new_tokens": whole(RequestError, "max_new_tokens", self.max_new_tokens, 1),
            "temperature": number(
                RequestError, "temperature", self.temperature, lambda value: value >= 0, "0 (greedy) or more"
            ),
            "top_k": whole(RequestError, "top_k", self.top_k, 0, _MOST_TOP_K),
            "top_p": number(
                RequestError, "top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1 (all tokens)"
            ),
            "seed": whole(RequestError, "seed", self.seed, 0, _MOST_SEED),
            "logprobs": yes_or_no(RequestError, "logprobs", self.logprobs),
            "top_logprobs": whole(RequestError, "top_logprobs", self.top_logprobs, 0, MOST_LIKELY),
            "n": whole(RequestError, "n", self.n, 1, _MOST_SEQUENCES),
        }
        if self.deadline is not None:
            plain["deadline"] = number(
                RequestError, "deadline", self.deadline, lambda value: value > 0, "seconds, more than 0"
            )
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs come with logprobs; set these, or leave top_logprobs out.")
        for name in ("tenant", "cache_salt"):
            if not isinstance(getattr(self, name), str):
                raise RequestError(f"{name} is {shown(getattr(self, name))}; give a string.")
        if self.n > 1 and not self.temperature:
            raise RequestError(f"n={self.n} sequences of temperature 0 would all be the same; raise the temperature.")


def token_ids(prompt: object, vocabulary: int) -> tuple[int, ...]:
    """A prompt's ids, checked.

    Args:
        prompt: a sequence or an iterator of ids, or a tensor or an array of one row.
        vocabulary: ids must be below it.

    Raises:
        RequestError: there are none, or something among them is no id.
    """
    found = _ids("the prompt", prompt, vocabulary)
    if not found:
        raise RequestError("the prompt is empty; give at least one token (the tokenizer's bos_token_id).")
    return found


def check_added(prompt: tuple[int, ...], vocabulary: int, adapter: Adapter) -> None:
    """Refuses tokens that the base does not have where the adapter does not act, or has none such either.

    Args:
        prompt: ids, not negative.
        vocabulary: the base's; its ids are below it.
        adapter: whose request it is.

    Raises:
        RequestError: there are some.
    """
    if max(prompt) < vocabulary:
        return
    start = 0 if adapter.invocation is None else last_occurrence(adapter.invocation, prompt)
    for place, token in enumerate(prompt):
        if token >= vocabulary + adapter.added:
            raise RequestError(
                f"the prompt holds the token {token} at {place}, but with adapter {adapter.name!r} ids are 0 to "
                f"{vocabulary + adapter.added - 1}; was it replaced under its name?"
            )
        if token >= vocabulary and (start is None or place < start):
            raise RequestError(
                f"the prompt holds the token {token} at {place}, which adapter {adapter.name!r} adds, but the adapter "
                "acts from its invocation tokens on; put these before it."
            )


def stop_tokens(stop: object, vocabulary: int) -> frozenset[int]:
    """Tokens that end a request, checked.

    Args:
        stop: one id, any number of them, or None.
        vocabulary: ids must be below it.

    Raises:
        RequestError: something among them is no id.
    """
    if stop is None:
        return frozenset()
    if isinstance(stop, Set):
        stop = list(stop)
    # One id, numpy's or a tensor of no dimension among them.
    return frozenset(_ids("stop_token_ids", [stop] if _is_one(stop) else stop, vocabulary))


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """Texts that end a request, checked.

    Raises:
        RequestError: something among them is no text, is empty or too long, or there are too many.
    """
    if stop is None:
        return ()
    if isinstance(stop, bytes | bytearray | Mapping) or not isinstance(stop, Iterable):
        raise RequestError(f"stop is {shown(stop)}; give a text, or a list of texts.")
    found = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(found) > _MOST_STOPS:
        raise RequestError(f"stop holds {len(found)} texts; give at most {_MOST_STOPS}.")
    for text in found:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop holds {shown(text)}; give texts of at least one character.")
        size = len(text.encode(errors="surrogatepass"))
        if size > _LONGEST_STOP:
            raise RequestError(f"stop holds {shown(text)} of {size} bytes; give texts of at most {_LONGEST_STOP}.")
    return found


def _ids(what: str, given: object, vocabulary: int) -> tuple[int, ...]:
    """Ids, checked: prompts are long, so nothing is done for each of them in Python but where something is wrong."""
    if isinstance(given, Mapping) and "input_ids" in given:
        raise RequestError(f"{what} is a {type(given).__name__}; give its input_ids.")
    if isinstance(given, str | bytes | bytearray | Mapping | Set) or not isinstance(given, Iterable):
        raise RequestError(f"{what} is a {type(given).__name__}; give token ids, as a tokenizer makes them.")
    if hasattr(given, "shape") and hasattr(given, "tolist"):  # a tensor or an array
        shape = tuple(given.shape)
        if len(shape) != 1 and (len(shape) != 2 or shape[0] != 1):
            raise RequestError(f"{what} has the shape {shape}; give the token ids of one row.")
        given = (given if len(shape) == 1 else given[0]).tolist()  # type: ignore[index]
        assert isinstance(given, list)
    ids = list(given)
    if set(map(type, ids)) - {int}:
        ids = [_id(what, place, value) for place, value in enumerate(ids)]
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
        place, token = next((at, token) for at, token in enumerate(ids) if not 0 <= token < vocabulary)
        raise RequestError(
            f"{what} holds the token {shown(token)} at {place}, but ids are 0 to {vocabulary - 1}; was it made by "
            "another model's tokenizer?"
        )
    return tuple(ids)


def _id(what: str, place: int, value: object) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise RequestError(f"{what} holds {shown(value)} at {place}; token ids are whole numbers.")


def _is_one(value: object) -> bool:
    """Whether it is an id by itself."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
