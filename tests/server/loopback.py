"""What the server of the tests serves, in this process on a port of loopback."""

import copy
import threading
import time
from contextlib import contextmanager

import uvicorn

from lorakit import Engine, MultiLoraModel
from lorakit.engine.config import EngineConfig
from lorakit.server.app import create_app
from lorakit.server.served import Served

BASE = "org/tiny"
TENANTS = ("sql", "poet", "clerk")


@contextmanager
def serving(base, tenants, tokenizer, *, bank=None, memory=None, **options):
    """The application, listening at its `url`; options are `create_app`'s."""
    model = MultiLoraModel(copy.deepcopy(base), bank, adapter_memory=memory)
    for name, peft in tenants.items():
        model.load_adapter(name, peft)

    def load(on_end):
        config = EngineConfig(max_requests=8, max_batch_tokens=256, cache_memory=1 << 24, stop_timeout=10)
        return Served(Engine(model, config, decode=tokenizer.decode, on_end=on_end).start(), tokenizer, BASE)

    app = create_app(load, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not (server.started and app.served):
        assert thread.is_alive() and app.failed is None and time.monotonic() < end
        time.sleep(0.02)
    app.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield app
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive() and app.served.engine.state == "closed"


def until(condition, seconds=20.0):
    """Waits for something to be so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
