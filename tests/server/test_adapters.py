"""Adapters loaded and unloaded while the server runs, in vLLM's and SGLang's paths."""

import concurrent.futures
import json

import httpx
import openai
import pytest
from loopback import BASE, serving, until
from speaking import tenant_of

from lorakit.server.access import Access
from lorakit.server.accounts import Account, Accounts
from lorakit.server.adapters import Sources

ADMIN = "an-administrators-key"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory, base):
    """A folder with checkpoints, and one beside it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("one", "two")):
        tenant_of(base, 10 + seed).save_pretrained(folder / "root" / name)
    tenant_of(base, 12).save_pretrained(folder / "secret")
    (folder / "root" / "link").symlink_to(folder / "secret")
    (folder / "root" / "bad").mkdir()
    (folder / "root" / "bad" / "adapter_config.json").write_text("{}")
    return folder / "root"


@pytest.fixture(scope="module")
def app(base, tenants, tokenizer, root):
    with serving(base, tenants, tokenizer, access=Access(admin_key=ADMIN), sources=Sources([root])) as app:
        yield app


@pytest.fixture
def http(app):
    with httpx.Client(base_url=app.url, timeout=60, headers={"Authorization": f"Bearer {ADMIN}"}) as http:
        yield http


@pytest.fixture
def client(app):
    with openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def answer_of(client, model, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=MESSAGES, **options).choices[0].message.content


def test_vllms_paths(http, client, root):
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(root / "one")})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert {card.id: card for card in client.models.list()}["new"].parent == BASE
    assert answer_of(client, "new") != answer_of(client, BASE)
    again = http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(root / "two")})
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]
    first = answer_of(client, "new")
    body = {"lora_name": "new", "lora_path": "two", "load_inplace": True}  # below a root
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert answer_of(client, "new") != first
    unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": "new", "lora_int_id": None})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        answer_of(client, "new")
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404


def test_sglangs_paths(app, http, client, root):
    body = {"lora_name": "new", "lora_path": str(root / "one"), "pinned": True}
    loaded = http.post("/load_lora_adapter", json=body)
    assert loaded.status_code == 200
    assert loaded.json()["success"] and loaded.json()["loaded_adapters"]["new"] == str(root / "one")
    assert app.served.engine.model.pinned == {"new"}
    assert answer_of(client, f"{BASE}:new")
    again = http.post("/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert not again.json()["success"] and "new" in again.json()["error_message"]
    unloaded = http.post("/unload_lora_adapter", json={"lora_name": "new"})
    assert unloaded.json()["success"] and "new" not in unloaded.json()["loaded_adapters"]
    assert app.served.engine.model.pinned == set()
    assert not http.post("/unload_lora_adapter", json={"lora_name": "new"}).json()["success"]


def test_memory_is_free_when_running_requests_have_ended(app, http, client, root):
    pool = app.served.engine.model.pool
    before = pool.nbytes
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "one"}).status_code == 200
    options = {"max_tokens": 450, "extra_body": {"ignore_eos": True}, "temperature": 0}
    stream = client.chat.completions.create(model="new", messages=MESSAGES, stream=True, **options)
    next(iter(stream))
    until(lambda: pool.nbytes > before)  # the first event comes before the adapter
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
    assert pool.nbytes > before, "a request runs"
    *_, last = stream
    assert last.choices[0].finish_reason == "length", "it runs to its end"
    until(lambda: pool.nbytes == before)


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc", "link", "..", "", "nothing", "org/model", "/", "~", "one/../../secret", "\0", "a" * 2000],
)
def test_paths_outside_the_roots_are_refused(http, root, path):
    told = []
    for given in (path, str(root / path) if "\0" not in path else path):
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": given})
        if given in ("", str(root / "")):  # the root itself holds no checkpoint
            assert answer.status_code == 400
            continue
        assert answer.status_code == 400, answer.text
        told.append(answer.json()["error"]["message"])
    assert all("cannot be loaded" in one for one in told)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"lora_name": "x"}, 400),
        ({"lora_path": "one"}, 400),
        ({"lora_name": 5, "lora_path": "one"}, 400),
        ({"lora_name": "", "lora_path": "one"}, 400),
        ({"lora_name": "a/b", "lora_path": "one"}, 400),
        ({"lora_name": "x", "lora_path": "bad"}, 400),
        ({"lora_name": "x", "lora_path": "one", "pinned": "yes"}, 400),
    ],
)
def test_what_cannot_be_loaded_changes_nothing(app, http, body, status):
    before = app.served.names
    for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        answer = http.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert "Traceback" not in answer.text
    assert app.served.names == before


def test_only_the_administrator_may(app):
    with httpx.Client(base_url=app.url) as http:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ADMIN}):
                answer = http.post(path, json={"lora_name": "sql", "lora_path": "one"}, headers=headers)
                assert answer.status_code == 401, path
    assert "sql" in app.served.names


def test_without_an_administrator_there_is_no_such_route(url):
    with httpx.Client(base_url=url) as http:
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "sql"}).status_code == 404
        assert "/v1/load_lora_adapter" not in http.get("/openapi.json").json()["paths"]


def test_the_hub_only_if_it_is_allowed(monkeypatch, tmp_path):
    from lorakit.server.faults import Fault

    (tmp_path / "org" / "beside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert Sources(hub=True).find("org/model") == "org/model"
    for sources, path in (
        (Sources(), "org/model"),
        (Sources(hub=True), "../model"),
        (Sources(hub=True), "a/b/c"),
        (Sources(hub=True), "org/beside"),
    ):
        with pytest.raises(Fault):
            sources.find(path)


def test_many_at_once(app, http, client, root):
    """One after another, while answers go on."""
    names = [f"n{number}" for number in range(8)]

    def load(name):
        return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "one"}).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(answer_of, client, "sql") for _ in range(4)]
        assert set(pool.map(load, names)) == {200}
        assert len({answer.result() for answer in answers}) == 1
        assert sorted(pool.map(load, ["same"] * 4)) == [200, 400, 400, 400]
    assert answer_of(client, "n0") == answer_of(client, "n7")
    for name in (*names, "same"):
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200


def test_an_adapter_is_loaded_for_a_tenant_of(base, tenants, tokenizer, root, tmp_path):
    accounts = Accounts(tmp_path / "tenants.db", create=True)
    for name in ("acme", "rival"):
        accounts.add(Account(name))
    access = Access(accounts, admin_key=ADMIN)
    header = {"Authorization": f"Bearer {ADMIN}"}
    with (
        serving(base, tenants, tokenizer, access=access, sources=Sources([root])) as app,
        httpx.Client(base_url=app.url, timeout=60) as http,
    ):

        def load(**body):
            return http.post("/v1/load_lora_adapter", json={"lora_path": "one", **body}, headers=header)

        def seen(name):
            keyed = {"Authorization": f"Bearer {accounts.new_key(name).text}"}
            return {card["id"] for card in http.get("/v1/models", headers=keyed).json()["data"]}

        assert load(lora_name="hers", tenant="acme").status_code == 200
        assert load(lora_name="everyones", public=True).status_code == 200
        assert load(lora_name="nobodys").status_code == 200
        refused = load(lora_name="whose", tenant="nobody")
        assert refused.status_code == 400 and "nobody" in refused.text and "whose" not in app.served.names
        assert seen("acme") == {BASE, "hers", "everyones"} and seen("rival") == {BASE, "everyones"}
        # A tenant's key is no administrator's, and the metrics name tenants.
        keyed = {"Authorization": f"Bearer {accounts.new_key('acme').text}"}
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "hers"}, headers=keyed).status_code == 401
        assert http.get("/metrics", headers=keyed).status_code == 401 == http.get("/metrics").status_code
        assert http.get("/metrics", headers=header).status_code == 200
        json.dumps(http.get("/openapi.json").json())
    accounts.close()
