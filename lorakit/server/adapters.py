"""Adapters loaded and unloaded while the server runs, in vLLM's and SGLang's own paths and bodies.

    POST /v1/load_lora_adapter      vLLM: {lora_name, lora_path, load_inplace} → a sentence
    POST /v1/unload_lora_adapter    vLLM: {lora_name}
    POST /load_lora_adapter         SGLang: {lora_name, lora_path, pinned} → {success, error_message, loaded_adapters}
    POST /unload_lora_adapter       SGLang: {lora_name}

Both kinds take what either does. For the administrator alone.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from lorakit.errors import AdapterExistsError, AdapterNotFoundError, LorakitError
from lorakit.server.access import Access
from lorakit.server.faults import Fault, log
from lorakit.server.served import Served

_LONGEST = 4096
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class LoadBody(BaseModel):
    """What is loaded."""

    model_config = ConfigDict(extra="ignore")  # their clients send more than is needed here

    lora_name: StrictStr = Field(max_length=_LONGEST)
    lora_path: StrictStr = Field(max_length=_LONGEST)
    load_inplace: StrictBool = False
    pinned: StrictBool = False
    tenant: StrictStr | None = Field(None, max_length=_LONGEST)
    public: StrictBool = False


class UnloadBody(BaseModel):
    """What is unloaded."""

    model_config = ConfigDict(extra="ignore")

    lora_name: StrictStr = Field(max_length=_LONGEST)


class Sources:
    """Where adapters may be loaded from: folders below some roots, and the Hub."""

    def __init__(self, roots: Sequence[Path] = (), *, hub: bool = False) -> None:
        """Allows these.

        Args:
            roots: folders; what lies below them may be loaded.
            hub: whether Hub ids may be.
        """
        self._roots = [root.resolve() for root in roots]
        self._hub = hub

    def find(self, path: str) -> str:
        """A checkpoint as `MultiLoraModel.load_adapter` takes it.

        Args:
            path: a folder, absolute or below a root, or a Hub id.

        Raises:
            Fault: it may not be loaded from there. Whether there is something elsewhere, it does not tell.
        """
        for root in self._roots:
            with suppress(OSError, ValueError):  # too long, or no path at all
                folder = Path(os.path.realpath(root / path))  # of links too
                if folder.is_relative_to(root) and folder.is_dir():
                    return str(folder)
        # What lies beside the server by that name would be loaded in the place of the Hub's.
        if self._hub and _HUB_ID.fullmatch(path) and not os.path.lexists(path):
            return path
        allowed = ["a folder below one of --adapter-root"] * bool(self._roots) + ["a Hub id"] * self._hub
        where = " or ".join(allowed) or "nothing, as neither --adapter-root nor --adapter-hub is set"
        message = f"lora_path {path!r} cannot be loaded; what can is {where}."
        raise Fault(400, message, param="lora_path", code="invalid_value")


def make_routes(ready: Callable[[], Served], access: Access, sources: Sources) -> APIRouter:
    """The routes.

    Args:
        ready: what is served.
        access: who may use them.
        sources: where adapters may come from.
    """

    def admin(request: Request) -> None:
        access.check_admin(request.headers)

    routes = APIRouter(dependencies=[Depends(admin)], tags=["adapters"])
    turn = asyncio.Lock()  # one after another: each needs memory for a checkpoint
    paths: dict[str, str] = {}

    async def load(body: LoadBody) -> None:
        served, source = ready(), sources.find(body.lora_path)
        async with turn:
            await asyncio.to_thread(_load, served, access, body, source)
            paths[body.lora_name] = body.lora_path

    async def unload(body: UnloadBody) -> None:
        served = ready()
        async with turn:
            await asyncio.to_thread(served.engine.model.unload_adapter, body.lora_name)
            paths.pop(body.lora_name, None)
        log.info("adapter %s was unloaded", body.lora_name)

    @routes.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_vllm(body: LoadBody) -> Response:
        """Loads an adapter, as vLLM does."""
        await _told(load(body))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_vllm(body: UnloadBody) -> Response:
        """Unloads an adapter, as vLLM does."""
        await _told(unload(body))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @routes.post("/load_lora_adapter", response_model=None)
    async def load_sglang(body: LoadBody) -> Response:
        """Loads an adapter, as SGLang does."""
        return await as_sglang(load(body))

    @routes.post("/unload_lora_adapter", response_model=None)
    async def unload_sglang(body: UnloadBody) -> Response:
        """Unloads an adapter, as SGLang does."""
        return await as_sglang(unload(body))

    async def as_sglang(done: Coroutine[Any, Any, None]) -> Response:
        fault = None
        try:
            await _told(done)
        except Fault as error:
            fault = error
        names = ready().names
        answer = {
            "success": fault is None,
            "error_message": "" if fault is None else str(fault),
            "loaded_adapters": {name: paths.get(name, "") for name in names},
        }
        return JSONResponse(answer, status_code=200 if fault is None else 400)

    return routes


def _load(served: Served, access: Access, body: LoadBody, source: str) -> None:
    """Loads, pins and grants; if one of them fails, nothing is changed but what was replaced."""
    model, name = served.engine.model, body.lora_name
    if access.accounts is not None and body.tenant is not None:
        access.accounts.get(body.tenant)  # before minutes are spent
    model.load_adapter(name, source, replace=body.load_inplace)
    try:
        if body.pinned:
            model.pin_adapter(name)
        if access.accounts is not None:
            for tenant in [body.tenant] * (body.tenant is not None) + [None] * body.public:
                access.accounts.grant(tenant, [name])
    except LorakitError:
        model.unload_adapter(name)
        raise
    log.info("adapter %s was loaded from %s", name, source)


async def _told(done: Coroutine[Any, Any, None]) -> None:
    """Errors as vLLM tells them: 400 for an adapter that is there, 404 for one that is not.

    The administrator is told all.
    """
    try:
        await done
    except AdapterNotFoundError as error:
        raise Fault(404, str(error), type="NotFoundError", param="lora_name", code="adapter_not_found") from error
    except AdapterExistsError as error:
        message = f"{str(error).rstrip('.')}, or send load_inplace."
        raise Fault(400, message, param="lora_name", code="adapter_exists") from error
    except LorakitError as error:
        raise Fault(400, str(error), code="adapter_refused") from error
