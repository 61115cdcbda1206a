"""What a server serves: an engine, its tokenizer, and the names under which clients know its adapters."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from lorakit.engine.handle import RequestHandle
from lorakit.engine.stats import EngineState, EngineStats
from lorakit.engine.tenants import TenantPolicy
from lorakit.errors import AdapterNotFoundError
from lorakit.server.bodies import ChatBody, CompletionBody, Message
from lorakit.server.faults import Fault, no_such_model

_T = TypeVar("_T")

_RESERVED = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


class ServedAdapters(Protocol):
    """The adapters of what serves: a model's, or a cluster's."""

    @property
    def adapters(self) -> list[str]:
        """Their names."""
        ...

    def has_adapter(self, name: str) -> bool:
        """Whether there is one."""
        ...

    def load_adapter(self, name: str, source: str, *, replace: bool = False) -> None:
        """See `MultiLoraModel`."""
        ...

    def pin_adapter(self, name: str) -> None:
        """See `MultiLoraModel`."""
        ...

    def unload_adapter(self, name: str) -> None:
        """See `MultiLoraModel`."""
        ...


class Serving(Protocol):
    """What serves requests: an engine, or a cluster of them. See `Engine`."""

    @property
    def model(self) -> ServedAdapters:
        """Its adapters."""
        ...

    @property
    def state(self) -> EngineState:
        """Whether it serves."""
        ...

    @property
    def submit(self) -> Callable[..., RequestHandle]:
        """Queues a request."""
        ...

    def set_tenant(self, name: str, policy: TenantPolicy) -> None:
        """Gives a tenant another policy."""
        ...

    def stats(self) -> EngineStats:
        """What it is doing."""
        ...

    def close(self) -> None:
        """Ends it."""
        ...


class Served:
    """An engine that has begun, and what makes text of its tokens.

    Attributes:
        engine: the engine, or a cluster of them.
        base_id: the base's name for clients.
    """

    def __init__(
        self, engine: Serving, tokenizer: PreTrainedTokenizerBase, base_id: str, *, request_timeout: float | None = None
    ) -> None:
        """Serves from now on.

        Args:
            engine: runs, and has `decode` of this tokenizer, for stop strings.
            tokenizer: the base's.
            base_id: the base's name for clients.
            request_timeout: seconds after which a request fails; None: never.
        """
        self.engine = engine
        self.base_id = base_id
        self._tokenizer = tokenizer
        self._timeout = request_timeout
        # Of its own: long prompts must not keep others from being queued.
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="lorakit-prompt")

    @property
    def names(self) -> list[str]:
        """The adapters, by name."""
        return self.engine.model.adapters

    def adapter_of(self, model: str, may_use: Callable[[str], bool]) -> str | None:
        """Whom a request's `model` names: an adapter, `base:adapter`, or the base (None).

        Args:
            model: as the client calls it.
            may_use: whether the client may use an adapter.

        Raises:
            Fault: nobody that the client may use; it takes as long if there is one that others may.
        """
        if model == self.base_id:
            return None
        for name in (model, model.removeprefix(f"{self.base_id}:")):
            there, allowed = self.engine.model.has_adapter(name), may_use(name)
            if there and allowed:
                return name
        raise no_such_model(model)

    async def chat_prompt(self, body: ChatBody) -> list[int]:
        """The ids of a conversation, by the tokenizer's chat template.

        Raises:
            Fault: it has none, or that does not take the messages.
        """
        if not self._tokenizer.chat_template:
            message = f"{self.base_id!r} has no chat template; use /v1/completions."
            raise Fault(400, message, param="messages", code="no_template")
        options = body.chat_template_kwargs or {}
        reserved = sorted(_RESERVED & set(options))
        if reserved:  # a template of a client's own could keep the server busy for ever
            message = f"{reserved[0]!r} is not a client's to set; leave it out."
            raise Fault(400, message, param="chat_template_kwargs", code="invalid_value")
        tools = None if body.tool_choice == "none" else body.tools or None
        return await self._aside(self._rendered, [_plain(message) for message in body.messages], tools, options)

    async def text_prompts(self, body: CompletionBody) -> list[list[int]]:
        """The ids of each prompt of a completion."""
        return await self._aside(
            lambda: [self._ids(one, special=True) if isinstance(one, str) else one for one in body.prompts]
        )

    async def _aside(self, work: Callable[..., _T], *args: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._writers, work, *args)

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # a template raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            message = f"the chat template does not take these messages: {reason}."
            raise Fault(400, message, param="messages", code="invalid_value") from error
        # A template writes its own special tokens.
        return self._ids(str(text), special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        if not _is_text(text):
            raise Fault(400, "the prompt holds half of a surrogate pair, which is no text.", code="invalid_value")
        found: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """A single token's text, special ones too."""
        return str(self._tokenizer.decode([token]))

    async def submit(self, prompt: Sequence[int], adapter: str | None, settings: dict[str, Any]) -> RequestHandle:
        """Queues a request.

        Raises:
            Fault, LorakitError: it cannot be served.
        """
        try:
            # The model's lock may be held for as long as an adapter takes to be read.
            return await asyncio.to_thread(self.engine.submit, prompt, adapter, deadline=self._timeout, **settings)
        except AdapterNotFoundError:  # removed since it was looked up
            raise no_such_model(adapter or self.base_id) from None


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON can hold what cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(message: Message) -> dict[str, Any]:
    """A message whose parts of text are one text, as most templates want it.

    Raises:
        Fault: a part is no text.
    """
    plain = message.model_dump(exclude_unset=True)
    if not isinstance(message.content, list):
        return plain
    texts = []
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Fault(400, "only parts of text are served in a message's content.", param="messages")
        texts.append(part["text"])
    return {**plain, "content": "".join(texts)}
