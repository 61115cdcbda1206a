"""`lorakit serve`: a base and its bank behind HTTP, until SIGTERM or SIGINT.

The port is open at once and `/health` says "starting" until the model is there. When the server is told to end it takes
no more connections, lets requests under way end, and goes.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import uvicorn

from lorakit.adapters.bank import AdapterBank
from lorakit.engine.config import EngineConfig
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel
from lorakit.server.access import Access
from lorakit.server.accounts import Accounts
from lorakit.server.adapters import Sources
from lorakit.server.app import OnEnd, create_app
from lorakit.server.faults import log
from lorakit.server.logs import LogFormat, begin_log
from lorakit.server.replicas import Replicas, base_options, start_cluster
from lorakit.server.served import Served, Serving
from lorakit.server.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Settings:
    """What is served, and where.

    Attributes:
        base: a folder or a Hub id.
        bank: the bank's folder or Hub id.
        revision: of a bank on the Hub; None: main.
        name: the base's name for clients; None: the Hub id, or the folder's own name.
        host: the address to listen at.
        port: the port; 0: any that is free.
        dtype: the base's, as torch names it; "auto": as it is stored.
        attention: transformers' implementation; None: its default.
        request_timeout: seconds after which a request fails; None: never.
        drain: seconds that requests under way have when the server ends.
        tenants: the file of tenants; None: everyone may use everything.
        admin_key: the administrator's key; None: adapters are not managed over HTTP.
        adapter_roots: folders from below which the administrator may load adapters.
        adapter_hub: whether from the Hub, too.
        log_format: "text" or "json".
        engine: the engine's settings.
        replicas: how many engines there are, on Ray; None: one, in this process.
    """

    base: str
    bank: str
    revision: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    attention: str | None = None
    request_timeout: float | None = None
    drain: float = 30.0
    tenants: Path | None = None
    admin_key: str | None = None
    adapter_roots: Sequence[Path] = ()
    adapter_hub: bool = False
    log_format: LogFormat = "text"
    engine: EngineConfig = field(default_factory=EngineConfig)
    replicas: Replicas | None = None


def serve(settings: Settings) -> None:
    """Serves until the process is told to end.

    Raises:
        LorakitError: the model cannot be loaded, see `load`; or the file of tenants is none.
        OSError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with ExitStack() as opened:
        accounts = None if settings.tenants is None else opened.enter_context(closing(Accounts(settings.tenants)))
        listener = opened.enter_context(socket.socket(family))
        # Before minutes are spent on loading.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        begin_log(settings.log_format)
        if settings.replicas is not None:
            from lorakit.scheduler.ray_cluster import connected

            opened.enter_context(connected(settings.replicas.address))
            # uvicorn raises it again when it has ended, and Ray is to be left in order.
            signal.signal(signal.SIGTERM, lambda *_: None)
        host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
        log.info("%s at http://%s:%d", settings.bank, host, listener.getsockname()[1])

        def end() -> None:
            server.should_exit = True

        app = create_app(
            partial(load, settings),
            access=Access(accounts, admin_key=settings.admin_key),
            sources=Sources(settings.adapter_roots, hub=settings.adapter_hub),
            on_failure=end,
        )
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(settings.drain))
        )
        server = uvicorn.Server(config)
        server.run(sockets=[listener])
    if app.failed is not None:
        raise app.failed


def load(settings: Settings, on_end: OnEnd) -> Served:
    """Loads the base, opens the bank and starts an engine, or many.

    Args:
        settings: what is loaded.
        on_end: as `Engine` takes it.

    Raises:
        BaseModelNotFoundError: there is no such base, or it has no tokenizer.
        BankError: the folder or the repository holds no bank.
        HubError: the Hub does not give it.
        MissingDependencyError: several replicas, and no Ray.
        EngineError: no replica could begin.
        BaseModelMismatchError: the bank was made for another base.
    """
    tokenizer = read_tokenizer(settings.base)
    bank = AdapterBank.from_pretrained(settings.bank, revision=settings.revision)
    folder = Path(settings.base)
    name = settings.name or (folder.resolve().name if folder.is_dir() else settings.base)  # not where it lies
    serving: Serving
    if settings.replicas is None:
        options = base_options(settings.dtype, settings.attention)
        model = MultiLoraModel.from_pretrained(settings.base, bank, **options)
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        serving = Engine(model, settings.engine, decode=decode, on_end=on_end).start()
    else:
        serving = start_cluster(
            str(folder.resolve()) if folder.is_dir() else settings.base,
            bank,
            tokenizer,
            settings.replicas,
            dtype=settings.dtype,
            attention=settings.attention,
            config=settings.engine,
            on_end=on_end,
        )
    return Served(serving, tokenizer, name, request_timeout=settings.request_timeout)
