"""Errors as OpenAI's clients read them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lorakit.errors import (
    AccountError,
    AdapterNotFoundError,
    ConfigError,
    DeadlineExceededError,
    EngineBusyError,
    EngineError,
    EngineStoppedError,
    LorakitError,
    RequestError,
)

log = logging.getLogger("lorakit.server")


class Fault(Exception):
    """What a client is told.

    Attributes:
        status: HTTP's.
        body: as JSON.
        headers: beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        told = {"message": message, "type": type, "param": param, "code": code}
        self.body = {"error": {name: None if text is None else _written(text) for name, text in told.items()}}
        self.headers = headers or {}


def _written(text: str) -> str:
    """A text that can be sent: names of a client's may hold what JSON can and UTF-8 cannot."""
    return text.encode(errors="backslashreplace").decode()


def no_such_model(name: str) -> Fault:
    """Of an adapter that is not there, and of one that is another's alike."""
    return Fault(
        404,
        f"the model {name!r} does not exist; GET /v1/models lists those that do.",
        param="model",
        code="model_not_found",
    )


def of_validation(errors: Sequence[Any]) -> Fault:
    """Of a body that is not as it should be: the first thing that is wrong, by name.

    Args:
        errors: pydantic's.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return Fault(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}.")
    place = [str(part) for part in first["loc"] if part != "body"]
    param = place[0] if place else None
    if first["type"] == "extra_forbidden":
        return Fault(400, f"{param!r} is unknown, or not served; leave it out.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return Fault(400, f"{param or 'the body'} is missing.", param=param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return Fault(400, f"{'.'.join(place) or 'the body'}: {message}.", param=param, code="invalid_value")


def of(error: BaseException) -> Fault:
    """What a client is told of an error; of one that is not ours, nothing that could be a secret."""
    if isinstance(error, Fault):
        return error
    message = str(error)
    if isinstance(error, AdapterNotFoundError):
        # Its message names others that are there.
        return Fault(404, "the model does not exist any more.", param="model", code="model_not_found")
    if isinstance(error, EngineBusyError):
        seconds = max(1, round(error.retry_after))
        return Fault(429, message, type="rate_limit_error", code="engine_busy", headers={"Retry-After": str(seconds)})
    if isinstance(error, DeadlineExceededError):
        return Fault(504, message, type="timeout_error", code="deadline_exceeded")
    if isinstance(error, RequestError | ConfigError):
        return Fault(400, message)
    log.error("%s: %s", type(error).__name__, message)
    if isinstance(error, EngineError):
        told = "the engine does not run" if isinstance(error, EngineStoppedError) else "the engine failed"
        return Fault(503, f"{told}.", type="service_unavailable_error", headers={"Retry-After": "1"})
    if isinstance(error, AccountError):
        return Fault(500, "the server's file of tenants cannot be used; its log tells why.", type="server_error")
    if isinstance(error, LorakitError):  # it may tell of the server's folders
        told = "the adapter cannot be served; the server's log tells why."
        return Fault(500, told, type="server_error", code="adapter_failed")
    return Fault(500, "the server failed; its log tells more.", type="server_error")
