"""The HTTP application: OpenAI's routes, the list of models, health, metrics; adapters' management if there is one."""

from __future__ import annotations

import asyncio
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.engine.handle import RequestHandle
from lorakit.engine.intake import NEW_TOKENS
from lorakit.errors import LorakitError
from lorakit.server import faults
from lorakit.server.access import Access, Caller
from lorakit.server.adapters import Sources, make_routes
from lorakit.server.answers import Answer, ChatAnswer, CompletionAnswer
from lorakit.server.bodies import Asked, ChatBody, CompletionBody
from lorakit.server.faults import Fault, log
from lorakit.server.metrics import Metrics
from lorakit.server.served import Served

OnEnd: TypeAlias = Callable[[RequestHandle], None]

_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    Attributes:
        body: bytes of a request's body.
        n: sequences of a prompt.
        prompts: prompts of a completion.
    """

    body: int = 4 << 20
    n: int = 16
    prompts: int = 64


class App(FastAPI):
    """The application.

    Attributes:
        served: what it serves; None until it has been loaded.
        failed: why it could not be.
        ended: whether it serves no more.
        created: when it was made, in seconds since 1970.
    """

    served: Served | None = None
    failed: BaseException | None = None
    ended = False
    created: int

    @property
    def ready(self) -> Served:
        """What it serves.

        Raises:
            Fault: it is loading, or could not.
        """
        if self.served is None:
            what, again = ("could not load", {}) if self.failed else ("is loading", {"Retry-After": "1"})
            raise Fault(503, f"the server {what} its model.", type="service_unavailable_error", headers=again)
        return self.served


def create_app(
    load: Callable[[OnEnd], Served],
    *,
    limits: Limits | None = None,
    access: Access | None = None,
    sources: Sources | None = None,
    on_failure: Callable[[], None] | None = None,
) -> App:
    """Makes an application that answers at once, and serves when `load` has returned.

    Args:
        load: makes what is served, its engine running and telling of every request's end what it is given; called in a
            thread when the application starts. The engine is closed when the application ends.
        limits: what a client may ask for at most.
        access: who may ask, and for what; closed when the application ends. None: everyone, for everything.
        sources: where the administrator may load adapters from.
        on_failure: called when `load` has raised an error, which is then `App.failed`.
    """
    limits, access = limits or Limits(), access or Access()

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        def work() -> None:
            try:
                app.served = load(ended)
            except BaseException as error:  # noqa: BLE001 - told by /health, and to whoever started it
                app.failed = error
                if on_failure is not None:
                    on_failure()
            if app.ended and app.served is not None:
                app.served.engine.close()

        loading = threading.Thread(target=work, name="lorakit-load", daemon=True)
        loading.start()
        try:
            yield
        finally:
            app.ended = True  # a load under way is not waited for
            if app.served is not None:
                await asyncio.to_thread(app.served.engine.close)
            for counted in (metrics, access):
                await asyncio.to_thread(counted.close)

    def ended(handle: RequestHandle) -> None:
        metrics.ended(handle)
        access.ended(handle)

    async def caller(request: Request) -> Caller:
        found = access.caller(request.headers)
        request.state.tenant = found.name
        return found

    calls = Depends(caller)
    app = App(title="lorakit", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.created = int(time.time())
    metrics = Metrics(lambda: app.served)
    _add_faults(app)
    app.add_middleware(_Bounded, most=limits.body)
    app.add_middleware(_Logged)

    @app.get("/health")
    async def health() -> Response:
        """Whether it serves: starting, ready, restarting or dead."""
        state = "dead" if app.failed else "starting" if app.served is None else app.served.engine.state
        return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics(request: Request) -> Response:
        """What Prometheus reads; where there are tenants, whom it tells of, for the administrator alone."""
        if access.accounts is not None:
            access.check_admin(request.headers)
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models(who: Caller = calls) -> dict[str, Any]:
        """The base and its adapters."""
        served = app.ready
        return {"object": "list", "data": [_card(app, served, name) for name in (None, *who.usable(served.names))]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, who: Caller = calls) -> dict[str, Any]:
        """One of them."""
        return _card(app, app.ready, app.ready.adapter_of(name, who.may_use))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request, who: Caller = calls) -> Response:
        """Continues a conversation."""
        served = app.ready
        _check_n(body.n, limits)
        adapter = served.adapter_of(body.adapter, who.may_use)
        prompts = [await served.chat_prompt(body)]
        handles, done = await _submitted(served, access, who, prompts, adapter, body)
        answer = ChatAnswer(served, body.model, handles, include_usage=body.include_usage, done=done)
        return await _answered(answer, body.stream, request)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request, who: Caller = calls) -> Response:
        """Continues texts."""
        served = app.ready
        _check_n(body.n, limits)
        if not 1 <= len(body.prompts) <= limits.prompts:
            raise Fault(400, f"prompt holds {len(body.prompts)}; give 1 to {limits.prompts}.", param="prompt")
        adapter = served.adapter_of(body.adapter, who.may_use)
        prompts = await served.text_prompts(body)
        handles, done = await _submitted(served, access, who, prompts, adapter, body)
        answer = CompletionAnswer(served, body.model, handles, include_usage=body.include_usage, done=done)
        return await _answered(answer, body.stream, request)

    if access.has_admin:
        app.include_router(make_routes(lambda: app.ready, access, sources or Sources()))
    return app


def _check_n(n: int, limits: Limits) -> None:
    if n > limits.n:
        raise Fault(400, f"n is {n}; ask for at most {limits.n}.", param="n", code="invalid_value")


def _card(app: App, served: Served, name: str | None) -> dict[str, Any]:
    """A model as OpenAI lists it, with vLLM's `root` and `parent`."""
    return {
        "id": name or served.base_id,
        "object": "model",
        "created": app.created,
        "owned_by": "lorakit",
        "root": name or served.base_id,
        "parent": None if name is None else served.base_id,
    }


async def _submitted(
    served: Served,
    access: Access,
    who: Caller,
    prompts: Sequence[Sequence[int]],
    adapter: str | None,
    body: Asked,
) -> tuple[list[RequestHandle], Callable[[], None]]:
    """Queues all prompts, or none; with them what is to be called when nobody waits for them any more."""
    settings = body.settings()
    new = settings["max_new_tokens"] or NEW_TOKENS
    tokens = sum(len(prompt) + body.n * new for prompt in prompts)
    handles: list[RequestHandle] = []

    def cancel() -> None:
        for handle in handles:
            handle.cancel()

    until_done = ExitStack()
    try:
        until_done.enter_context(access.taken(who, body.n * len(prompts), tokens))
        until_done.callback(cancel)
        if who.account is not None:
            served.engine.set_tenant(who.account.name, who.account.policy)
            settings |= {"tenant": who.account.name, "cache_salt": who.salt(body.cache_salt)}
        elif access.accounts is not None:
            settings["tenant"] = ""  # the administrator's are nobody's
        for prompt in prompts:
            handles.append(await served.submit(prompt, adapter, settings))
    except BaseException:
        until_done.close()
        raise
    return handles, until_done.close


async def _answered(answer: Answer, stream: bool, request: Request) -> Response:
    """The answer; whoever goes away ends it."""
    if stream:
        # Proxies would keep pieces back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return _Stream(answer, headers)
    whole = asyncio.ensure_future(answer.whole())
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait([whole, gone], return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(whole.result())
    finally:
        whole.cancel()
        gone.cancel()
        answer.cancel()


class _Stream(StreamingResponse):
    """Events of an answer, which ends with the response also if nobody has read the first."""

    def __init__(self, answer: Answer, headers: dict[str, str]) -> None:
        super().__init__(answer.stream(), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_faults(app: FastAPI) -> None:
    """Every error is OpenAI's in shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _told(faults.of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        return _told(Fault(error.status_code, f"{str(error.detail).rstrip('.')}.", code=code))

    @app.exception_handler(Fault)
    @app.exception_handler(LorakitError)
    async def ours(_: Request, error: Exception) -> Response:
        return _told(faults.of(error))


def _told(fault: Fault) -> JSONResponse:
    return JSONResponse(fault.body, status_code=fault.status, headers=fault.headers)


class _Bounded:
    """Refuses bodies that are too large, as early as that is known."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            await _told(Fault(413, self._message, code="body_too_large"))(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"the body is larger than {self._most} bytes; shorten it."


class _Logged:
    """Gives every answer its request's id, logs it, and lets no traceback out.

    An ASGI middleware of its own kind: Starlette's for functions keeps a client's going away from those it wraps.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        status, started = 0, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:  # noqa: BLE001 - told without what it says
            log.exception("request %s failed", id)
            if not status:
                await _told(faults.of(error))(scope, receive, noted)
        finally:
            facts = {
                "request_id": id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.perf_counter() - started, 4),
                "tenant": scope.get("state", {}).get("tenant"),
            }
            log.info("%(method)s %(path)s %(status)d in %(seconds).3f s (%(request_id)s)", facts, extra=facts)
