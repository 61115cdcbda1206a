"""What a caller asks → a request, checked against a base, its adapters and the room of a cache.

An engine has one of its own model; who puts requests before engines elsewhere has one without. Knows configurations;
no model, no batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from lorakit.adapters import names
from lorakit.engine.request import Request, check_added, stop_strings, stop_tokens, token_ids
from lorakit.engine.stopping import Decode
from lorakit.errors import ConfigError, RequestError
from lorakit.runtime.roster import Adapter

NEW_TOKENS = 256
"""The most tokens that are generated if nothing else is said."""


class Adapters(Protocol):
    """Adapters by name, such as a model's."""

    @property
    def adapters(self) -> list[str]:
        """Their names."""
        ...

    def adapter(self, name: str) -> Adapter:
        """One of them, as it is now.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        ...


class Room(NamedTuple):
    """What limits a sequence's length.

    Attributes:
        what: it, in words.
        tokens: to how many.
    """

    what: str
    tokens: int


class Intake:
    """Makes requests."""

    def __init__(
        self,
        config: Any,
        generation_config: Any,
        adapters: Adapters,
        capacity: Callable[[], int],
        decode: Decode | None,
    ) -> None:
        """Makes requests for one base.

        Args:
            config: the base's.
            generation_config: the base's; its end-of-sequence tokens end a request.
            adapters: that may be asked for.
            capacity: the most tokens of a sequence that the cache holds, its prompt included.
            decode: token ids → their text; needed for stop strings alone.
        """
        self._config = config.get_text_config()
        self._generation_config = generation_config
        self._adapters = adapters
        self._capacity = capacity
        self._decode = decode

    def request(
        self,
        prompt: Sequence[int],
        adapter_id: str | None,
        *,
        max_new_tokens: int | None,
        seed: int | None,
        stop: str | Iterable[str] | None,
        stop_token_ids: int | Iterable[int] | None,
        ignore_eos: bool,
        tenant: str | None,
        **plain: Any,
    ) -> Request:
        """A request as `Engine.submit` takes it.

        Raises:
            RequestError: a parameter cannot be, or the request cannot fit the cache.
            AdapterNotFoundError: there is no such adapter.
            ConfigError: stop strings, and nothing that makes text of tokens.
        """
        if adapter_id is not None and not isinstance(adapter_id, str):
            raise names.not_found(adapter_id, self._adapters.adapters, "the model")
        adapter = None if adapter_id is None else self._adapters.adapter(adapter_id)
        base_vocabulary: int = self._config.vocab_size
        vocabulary = base_vocabulary + (0 if adapter is None else adapter.added)
        texts = stop_strings(stop)
        if texts and self._decode is None:
            raise ConfigError("stop strings need text: make the engine with decode=tokenizer.decode.")
        ids = token_ids(prompt, vocabulary)
        if adapter is not None:
            check_added(ids, base_vocabulary, adapter)
        room = self._room()
        if max_new_tokens is None:
            max_new_tokens = max(1, min(NEW_TOKENS, room.tokens - len(ids)))
        request = Request(
            prompt=ids,
            adapter=adapter_id,
            max_new_tokens=max_new_tokens,
            seed=random.getrandbits(63) if seed is None else seed,
            stop_token_ids=stop_tokens(stop_token_ids, vocabulary) | (set() if ignore_eos else self._eos()),
            stop_strings=texts,
            tenant=tenant if tenant is not None else adapter_id or "",
            **plain,
        )
        if len(ids) + max_new_tokens > room.tokens:
            raise RequestError(
                f"the prompt's {len(ids)} tokens and max_new_tokens={max_new_tokens} are {len(ids) + max_new_tokens}, "
                f"and {room.what} {room.tokens}; shorten one of them."
            )
        return request

    def _room(self) -> Room:
        rooms = [Room("the key-value cache holds", self._capacity())]
        positions = getattr(self._config, "max_position_embeddings", None)
        if positions is not None:
            rooms.append(Room("the model has positions for", positions))
        return min(rooms, key=lambda room: room.tokens)

    def _eos(self) -> set[int]:
        eos = self._generation_config.eos_token_id
        eos = self._config.eos_token_id if eos is None else eos
        return {eos} if isinstance(eos, int) else set(eos or ())
