"""What clients send: the bodies of OpenAI's routes, checked.

What would change an answer and is not served is refused by name; what only describes a request (`user`, `metadata`, …)
is taken and left alone. Extensions are those of vLLM: `top_k`, `stop_token_ids`, `ignore_eos`,
`cache_salt`, `chat_template_kwargs`; and SGLang's `lora_path`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from lorakit.engine.sampling import MOST_LIKELY

_LARGEST_SEED = (1 << 63) - 1
_MOST_STOPS = 64
_LONGEST_SALT = 256

_T = TypeVar("_T")
# Of lists the first mistake is enough: a body of a million would else have a million errors.
Many = Annotated[list[_T], FailFast()]


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("give a number")
    return value


def _stop(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and set(map(type, value)) <= {str}):
        if isinstance(value, list) and len(value) > _MOST_STOPS:
            raise ValueError(f"give at most {_MOST_STOPS} texts")
        return value
    raise ValueError("give a text, or a list of texts")


def _prompt(value: Any) -> Any:
    kinds = set(map(type, value)) if isinstance(value, list) else None
    if isinstance(value, str) or kinds in (set(), {str}, {int}):
        return value
    if kinds == {list} and all(set(map(type, one)) <= {int} for one in value):
        return value
    raise ValueError("give a text, a list of texts, token ids, or a list of such lists")


def _content(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and set(map(type, value)) <= {dict}):
        return value
    raise ValueError("give a text, or a list of parts")


Number = Annotated[float, BeforeValidator(_number)]
Stop = Annotated[Any, PlainValidator(_stop, json_schema_input_type=str | list[str])]
Prompt = Annotated[Any, PlainValidator(_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]])]
Content = Annotated[Any, PlainValidator(_content, json_schema_input_type=str | list[dict[str, Any]])]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class Asked(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    # SGLang's way to name an adapter beside its base.
    lora_path: StrictStr | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=-1)
    seed: StrictInt | None = Field(None, ge=-_LARGEST_SEED - 1, le=_LARGEST_SEED)
    stop: Stop | None = None
    stop_token_ids: Many[StrictInt] = []
    ignore_eos: StrictBool = False
    cache_salt: StrictStr = Field("", max_length=_LONGEST_SALT)
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

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: Any) -> Any:
        """As in OpenAI's API, whose clients send null for what they do not set."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for a stream; set stream to true, or leave it out")
        return self

    @property
    def adapter(self) -> str:
        """Whom it asks: an adapter, or the base."""
        return self.model if self.lora_path is None else self.lora_path

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
            "stop_token_ids": self.stop_token_ids or None,
            "ignore_eos": self.ignore_eos,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.most_likely,
            "n": self.n,
            "cache_salt": self.cache_salt,
        }

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to generate."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's logarithmic probability is asked for."""
        raise NotImplementedError

    @property
    def most_likely(self) -> int:
        """How many of the most likely tokens are asked for beside each."""
        raise NotImplementedError


class _ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class Message(BaseModel):
    """One message of a conversation; what else it holds is the template's."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: Content | None = None


class ChatBody(Asked):
    """POST /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    tools: Many[dict[str, Any]] = []
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Any = None
    modalities: Many[Literal["text"]] = []
    response_format: _ResponseFormat | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt = Field(0, ge=0, le=MOST_LIKELY)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs come with logprobs; set it to true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """OpenAI's newer name comes first."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """As asked."""
        return bool(self.logprobs)

    @property
    def most_likely(self) -> int:
        """As asked."""
        return self.top_logprobs


class CompletionBody(Asked):
    """POST /v1/completions."""

    prompt: Prompt
    # OpenAI's default.
    max_tokens: StrictInt | None = Field(16, ge=1)
    logprobs: StrictInt | None = Field(None, ge=0, le=MOST_LIKELY)
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
    def most_likely(self) -> int:
        """As asked."""
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each a text or ids."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else self.prompt
