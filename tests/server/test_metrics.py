"""What Prometheus reads, and the log."""

import io
import json
import logging
import time

import httpx
import pytest
from loopback import BASE, serving, until
from prometheus_client.parser import text_string_to_metric_families

from lorakit.server import logs

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def app(base, tenants, tokenizer):
    with serving(base, tenants, tokenizer) as app:
        yield app


@pytest.fixture
def http(app):
    with httpx.Client(base_url=app.url, timeout=60) as http:
        yield http


def samples(http):
    """Name and labels → value."""
    answer = http.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found, name, **labels):
    [one] = [found[key] for key in found if key[0] == name and set(labels.items()) <= set(key[1:])]
    return one


def test_counts_of_requests_and_tokens(http):
    before = samples(http)
    usage = [http.post("/v1/chat/completions", json={"model": name, **CHAT}).json()["usage"] for name in (BASE, "sql")]
    prompts, generated = (sum(one[kind] for one in usage) for kind in ("prompt_tokens", "completion_tokens"))
    until(lambda: ("vllm:request_success_total", ("finished_reason", "length"), ("model_name", BASE)) in samples(http))
    until(lambda: value(samples(http), "vllm:request_success_total", finished_reason="length") >= 2)
    after = samples(http)

    def grown(name, **labels):
        try:
            earlier = value(before, name, **labels)
        except ValueError:  # nothing had happened
            earlier = 0
        return value(after, name, **labels) - earlier

    assert grown("vllm:prompt_tokens_total", model_name=BASE) == prompts
    assert grown("vllm:generation_tokens_total", model_name=BASE) == generated == 10
    assert grown("vllm:time_to_first_token_seconds_count", model_name=BASE) == 2
    assert grown("vllm:inter_token_latency_seconds_count", model_name=BASE) == 8
    assert grown("vllm:request_queue_time_seconds_count", model_name=BASE) == 2
    assert 0 < grown("vllm:e2e_request_latency_seconds_sum", model_name=BASE) < 60
    assert grown("vllm:request_generation_tokens_sum", model_name=BASE) == 10
    assert grown("lorakit:tenant_generated_tokens_total", tenant="sql") == 5
    assert grown("lorakit:forwards_total") >= 5 and grown("lorakit:segments_total") >= 5
    assert value(after, "vllm:num_requests_running") == value(after, "vllm:num_requests_waiting") == 0
    assert value(after, "lorakit:engine_state", state="ready") == 1
    assert value(after, "lorakit:engine_state", state="dead") == 0


def test_what_gateways_schedule_by(http):
    body = {"model": "sql", **CHAT, "max_tokens": 300, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = (line for line in answer.iter_lines() if '"content":"' in line)
        next(lines), next(lines)  # it opens with an empty one
        labels = next(dict(key[1:]) for key in samples(http) if key[0] == "vllm:lora_requests_info")
        assert labels["running_lora_adapters"] == "sql" and labels["waiting_lora_adapters"] == ""
        assert int(labels["max_lora"]) >= 1
        assert value(samples(http), "vllm:num_requests_running") == 1
        assert value(samples(http), "vllm:kv_cache_usage_perc") > 0
    assert abs(value(samples(http), "vllm:lora_requests_info") - time.time()) < 60
    until(lambda: value(samples(http), "vllm:num_requests_running") == 0)


def test_residency_by_tier(base, tenants, tokenizer, tmp_path):
    """True residency: what lies where, and what came and went."""
    import lorakit

    for name, peft in tenants.items():
        peft.save_pretrained(tmp_path / name)
    bank = lorakit.export({name: tmp_path / name for name in tenants}, tmp_path / "bank", base_model=base)
    room = 2 * max(bank[name].nbytes for name in bank.names) + 1024
    with (
        serving(base, {}, tokenizer, bank=bank, memory=room) as app,
        httpx.Client(base_url=app.url, timeout=60) as http,
    ):
        assert value(samples(http), "lorakit:adapters", tier="device") == 0
        for name in bank.names:
            assert http.post("/v1/chat/completions", json={"model": name, **CHAT}).status_code == 200
        found = samples(http)
        assert value(found, "lorakit:adapters", tier="device") == 2
        assert 0 < value(found, "lorakit:adapter_bytes", tier="device") <= room
        assert value(found, "lorakit:adapter_limit_bytes", tier="device") == room
        assert value(found, "lorakit:adapter_loads_total") == value(found, "lorakit:adapter_reads_total") == 3
        assert value(found, "lorakit:adapter_evictions_total") == 1
        assert value(found, "lorakit:adapter_read_seconds_total") > 0
        labels = next(dict(key[1:]) for key in found if key[0] == "vllm:lora_requests_info")
        assert labels["max_lora"] == "2"


def test_failures_are_counted_by_kind(app, http):
    body = {"model": "sql", "prompt": "a", "max_tokens": 300, "ignore_eos": True}
    handle = app.served.engine.submit([5, 6, 7], "sql", max_new_tokens=400, deadline=0.05)
    until(lambda: handle.done)
    until(lambda: value(samples(http), "lorakit:request_failures_total", error="DeadlineExceededError") == 1)
    assert http.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 200


def test_before_it_is_ready_there_is_nothing_of_the_engine(tokenizer):
    from fastapi.testclient import TestClient

    from lorakit.server.app import create_app

    def load(_):
        raise RuntimeError("none")

    with TestClient(create_app(load)) as client:
        assert client.get("/metrics").status_code == 200 and "vllm:num_requests" not in client.get("/metrics").text


def test_the_log_in_json(http, monkeypatch):
    root, text = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr("sys.stderr", text)
    logs.begin_log("json")
    try:
        http.get("/v1/models/never", headers={"x-request-id": "mine"})
        until(lambda: "mine" in text.getvalue())
    finally:
        logs.log.setLevel(logging.NOTSET)
    [line] = [json.loads(line) for line in text.getvalue().splitlines() if "mine" in line]
    assert (line["request_id"], line["status"], line["path"]) == ("mine", 404, "/v1/models/never")
    assert line["level"] == "INFO" and line["logger"] == "lorakit.server" and line["seconds"] >= 0 and line["time"]
