"""What a server serves: an engine, its tokenizer, and the names under which clients know its adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.engine.engine import Engine
from lorakit.engine.handle import RequestHandle
from lorakit.errors import AdapterNotFoundError
from lorakit.server.bodies import ChatBody, CompletionBody
from lorakit.server.faults import Fault, no_such_model


class Served:
    """An engine that has begun, and what makes text of its tokens.

    Attributes:
        engine: the engine.
        base_id: the base's name for clients.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, base_id: str, *, request_timeout: float | None = None
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

    @property
    def names(self) -> list[str]:
        """The adapters, by name."""
        return self.engine.model.adapters

    def adapter_of(self, model: str) -> str | None:
        """Whom a request's `model` names: an adapter, `base:adapter`, or the base (None).

        Raises:
            Fault: nobody.
        """
        if model == self.base_id:
            return None
        names = set(self.names)
        short = model.removeprefix(f"{self.base_id}:")
        for name in (model, short):
            if name in names:
                return name
        raise no_such_model(model)

    def chat_prompt(self, body: ChatBody) -> list[int]:
        """The ids of a conversation, by the tokenizer's chat template.

        Raises:
            Fault: it has none, or that does not take the messages.
        """
        if not self._tokenizer.chat_template:
            raise Fault(
                400,
                f"{self.base_id!r} has no chat template; use /v1/completions.",
                param="messages",
                code="no_template",
            )
        tools = None if body.tool_choice == "none" else body.tools
        try:
            text = self._tokenizer.apply_chat_template(
                [_plain(message) for message in body.messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
                **(body.chat_template_kwargs or {}),
            )
        except Exception as error:  # a template raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Fault(
                400,
                f"the chat template does not take these messages: {reason}.",
                param="messages",
                code="invalid_value",
            ) from error
        # A template writes its own special tokens.
        return self._ids(str(text), special=False)

    def text_prompts(self, body: CompletionBody) -> list[list[int]]:
        """The ids of each prompt of a completion."""
        return [self._ids(one, special=True) if isinstance(one, str) else one for one in body.prompts]

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


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts of text are one text, as most templates want it.

    Raises:
        Fault: a part is no text.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Fault(400, "only parts of text are served in a message's content.", param="messages")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
