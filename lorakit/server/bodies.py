"""What clients send: the bodies of OpenAI's routes, checked.

What would change an answer and is not served is refused by name; what only describes a request (`user`, `metadata`, …)
is taken and left alone. Extensions are those of vLLM: `top_k`, `stop_token_ids`, `ignore_eos`, `chat_template_kwargs`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

_LARGEST_SEED = (1 << 63) - 1


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class _Asked(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=-1)
    seed: StrictInt | None = Field(None, ge=-_LARGEST_SEED - 1, le=_LARGEST_SEED)
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool = False
    n: StrictInt = Field(1, ge=1)

    # Served by their neutral value alone.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    # They describe the request.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for a stream; set stream to true, or leave it out")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self) -> dict[str, Any]:
        """As `Engine.submit` takes them."""
        return {
            "max_new_tokens": self.most_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(0, self.top_k),
            # The engine's are not negative.
            "seed": None if self.seed is None else self.seed % (1 << 64),
            "stop": self.stop or None,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "logprobs": self.wants_logprobs,
            "n": self.n,
        }

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's logarithmic probability is asked for."""
        raise NotImplementedError


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatBody(_Asked):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    response_format: _ResponseFormat | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Literal[0] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """OpenAI's newer name comes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """As asked."""
        return bool(self.logprobs)


class CompletionBody(_Asked):
    """POST /v1/completions."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    # OpenAI's default.
    max_tokens: StrictInt | None = Field(16, ge=1)
    logprobs: Literal[0] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: StrictInt | None = None

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of other than n is not served; leave it out")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """0 asks for the tokens' own."""
        return self.logprobs is not None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each a text or ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)
