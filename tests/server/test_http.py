"""What is below OpenAI's routes: health, ids, sizes, clients that go away, a process that is told to end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from fastapi.testclient import TestClient
from loopback import BASE, until

from lorakit.server.app import Limits, create_app

CHAT = {"model": "sql", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=30) as http:
        yield http


def sent(http, path, content):
    return http.post(path, content=content, headers={"content-type": "application/json"})


def test_health_tells_ready(http):
    answer = http.get("/health")
    assert answer.status_code == 200 and answer.json() == {"status": "ready"}


def test_health_tells_starting_and_dead(served):
    may_load, fails = threading.Event(), RuntimeError("no such base")

    def load(_):
        may_load.wait(30)
        raise fails

    with TestClient(create_app(load)) as client:
        assert client.get("/health").status_code == 503 and client.get("/health").json() == {"status": "starting"}
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503 and "is loading" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"] == "1"
        may_load.set()
        until(lambda: client.get("/health").json() == {"status": "dead"})
        assert "could not load" in client.get("/v1/models").json()["error"]["message"]


def test_every_answer_has_its_requests_id(http):
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("a b", "x" * 200)}
    assert len(made) == 2 and all(len(one) == 32 for one in made)
    assert "x-request-id" in http.get("/nowhere").headers


@pytest.mark.parametrize(
    ("call", "status", "says"),
    [
        (lambda http: http.get("/nowhere"), 404, "Not Found"),
        (lambda http: http.get("/v1/chat/completions"), 405, "Method Not Allowed"),
        (lambda http: sent(http, "/v1/chat/completions", b"{"), 400, "no JSON"),
        (lambda http: http.post("/v1/chat/completions", json=[]), 400, "the body"),
        (lambda http: http.post("/v1/chat/completions", json={"model": "sql"}), 400, "messages"),
        (lambda http: http.post("/v1/completions", json={"model": "sql", "prompt": []}), 400, "prompt"),
        (lambda http: http.post("/v1/completions", json={"model": "sql", "prompt": [[]]}), 400, "empty"),
        (lambda http: http.post("/v1/completions", json={"model": "sql", "prompt": [10**9]}), 400, "token"),
        (lambda http: http.post("/v1/completions", json={"model": "sql", "prompt": "a", "stop": ""}), 200, None),
        (lambda http: http.post("/v1/completions", json={"model": "sql", "prompt": "a", "stop": [""]}), 400, "stop"),
        (lambda http: sent(http, "/v1/completions", b'{"model": "sql", "prompt": "\\ud800"}'), 400, "prompt"),
        (lambda http: sent(http, "/v1/completions", b'{"model": "sql", "prompt": "a", "\\ud800": 1}'), 400, "unicode"),
        (lambda http: sent(http, "/v1/completions", b'{"model": "\\ud800", "prompt": "a"}'), 404, "\\ud800"),
    ],
    ids=range(13),
)
def test_mistakes_below_the_client(http, call, status, says):
    answer = call(http)
    assert answer.status_code == status, answer.text
    if says is not None:
        assert says in answer.json()["error"]["message"]


def test_large_bodies_are_refused(served):
    app = create_app(lambda _: served.served, limits=Limits(body=1000))
    app.served = served.served
    client = TestClient(app)  # its life does not begin: the engine is another's
    large = json.dumps({**CHAT, "messages": [{"role": "user", "content": "a" * 2000}]}).encode()
    assert client.post("/v1/chat/completions", content=large).status_code == 413

    def pieces():
        yield from (large[start : start + 100] for start in range(0, len(large), 100))

    answer = client.post("/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(http, served, stream):
    engine = served.served.engine
    until(lambda: engine.stats().open == 0)
    if stream:
        with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            lines = answer.iter_lines()
            for _ in range(4):
                next(lines)
            assert engine.stats().open == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json={**CHAT, "n": 8}, timeout=0.3)
    before = engine.stats().steps
    until(lambda: engine.stats().open == 0)
    assert engine.stats().steps - before < 200, "it did not run to its end"


def test_the_base_is_listed_under_its_name(http):
    assert http.get("/v1/models").json()["data"][0]["id"] == BASE


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base, tokenizer, tenants):
    """The base and a bank on the disk."""
    import lorakit

    folder = tmp_path_factory.mktemp("served")
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tenants["sql"].save_pretrained(folder / "sql")
    lorakit.export({"sql": folder / "sql"}, folder / "bank", base_model=str(folder / "base"))
    return folder


_ON_RAY = [pytest.mark.slow, pytest.mark.xdist_group("ray")]


@pytest.mark.parametrize("more", [(), pytest.param(("--replicas", "1:2"), marks=_ON_RAY, id="replicas")])
def test_the_command_serves_and_lets_requests_end_when_it_is_told_to(folders, tmp_path, more):
    if more:
        pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "lorakit", "serve", str(folders / "base"), "--bank", str(folders / "bank")]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--max-requests", "4", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        stderr=(tmp_path / "log").open("w"),  # a pipe would be full of what /health is asked
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:

            def ready():
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    return http.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            until(ready, 120)
            assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["base", "sql"]
            asked = {**CHAT, "stream": True, "max_tokens": 120}
            with http.stream("POST", "/v1/chat/completions", json=asked, headers={"x-request-id": "mine"}) as answer:
                lines = (line for line in answer.iter_lines() if line)
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        assert process.wait(90) in (0, -signal.SIGTERM)
        log = (tmp_path / "log").read_text()
        assert f"http://127.0.0.1:{port}" in log and "POST /v1/chat/completions 200" in log and "(mine)" in log
    finally:
        process.kill()


def test_what_cannot_be_served_is_told_by_the_command(folders, tmp_path):
    def end(*arguments):
        command = [sys.executable, "-m", "lorakit", "serve", *map(str, arguments), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "in use" in end(folders / "base", "--bank", folders / "bank")
    assert "no bank" in end(folders / "base", "--bank", tmp_path)
    assert "has no tokenizer that can be read" in end(tmp_path, "--bank", folders / "bank")
