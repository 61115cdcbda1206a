"""Tenants: who they are, what they see, how much they may ask for, and what is written of it."""

import json
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from loopback import BASE, serving, until

from lorakit.engine.config import EngineConfig
from lorakit.errors import AccountError
from lorakit.server import keys
from lorakit.server.access import Access
from lorakit.server.accounts import Account, Accounts, Used, today

ADMIN = "an-administrators-key"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def accounts(tmp_path_factory):
    found = Accounts(tmp_path_factory.mktemp("tenants") / "tenants.db", create=True)
    for name in ("acme", "rival"):
        found.add(Account(name))
    found.grant("acme", ["sql"])
    found.grant("rival", ["poet"])
    found.grant(None, ["clerk"])
    yield found
    found.close()


@pytest.fixture(scope="module")
def app(base, tenants, tokenizer, accounts):
    with serving(base, tenants, tokenizer, access=Access(accounts, admin_key=ADMIN)) as app:
        yield app


@pytest.fixture
def client_of(app, accounts):
    """Makes OpenAI's client for a tenant, or for a key."""
    made = []

    def client(who, key=None):
        key = key or (ADMIN if who is None else accounts.new_key(who).text)
        made.append(openai.OpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0, timeout=60))
        return made[-1]

    yield client
    for one in made:
        one.close()


def asked(client, model="sql", **options):
    return client.chat.completions.create(model=model, messages=MESSAGES, **{"max_tokens": 4, **options})


# Who comes in, and what is seen


def test_a_key_reaches_its_own_adapters_and_public_ones(client_of):
    client = client_of("acme")
    assert {card.id for card in client.models.list()} == {BASE, "sql", "clerk"}
    for model in (BASE, "sql", "clerk", f"{BASE}:sql"):
        assert asked(client, model).usage.completion_tokens <= 4
    assert {card.id for card in client_of(None).models.list()} == {BASE, "sql", "poet", "clerk"}
    assert asked(client_of(None), "poet").usage.completion_tokens <= 4


def test_of_others_adapters_it_cannot_tell_that_they_are_there(client_of):
    client, told = client_of("acme"), []
    for name in ("poet", "never", f"{BASE}:poet", f"{BASE}:never"):
        for call in (lambda name=name: asked(client, name), lambda name=name: client.models.retrieve(name)):
            with pytest.raises(openai.NotFoundError) as error:
                call()
            told.append(str(error.value.body).replace("poet", "NAME").replace("never", "NAME"))
    assert len(set(told)) == 2  # with the base's name before it, and without


def test_nor_can_it_tell_by_the_time_that_it_takes(app, client_of, monkeypatch):
    """The same is looked up, whether an adapter is there and another's, or nowhere."""
    model, looked_up = app.served.engine.model, []

    def noted(kind, real):
        return lambda *args: (looked_up.append(kind), real(*args))[1]

    monkeypatch.setattr(model, "has_adapter", noted("model", model.has_adapter))
    monkeypatch.setattr(Accounts, "may_use", noted("accounts", Accounts.may_use))
    client, found = client_of("acme"), {}
    for name in ("poet", "none", f"{BASE}:poet", f"{BASE}:none"):
        looked_up.clear()
        with pytest.raises(openai.NotFoundError):
            asked(client, name)
        found[name] = list(looked_up)
    assert found["poet"] == found["none"] == ["model", "accounts"] * 2
    assert found[f"{BASE}:poet"] == found[f"{BASE}:none"] == ["model", "accounts"] * 2


@pytest.mark.parametrize("key", ["lk-000000000000-wrong", "wrong", "lk-", "Ω", f"{ADMIN}x", ADMIN[:-1]])
def test_a_wrong_key_is_refused(app, key):
    with httpx.Client(base_url=app.url) as http:
        for headers in ({"Authorization": f"Bearer {key}".encode()}, {}, {"Authorization": "Basic abc"}):
            for path in ("/v1/models", "/v1/models/sql"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert "Bearer" in answer.headers["www-authenticate"]
            answer = http.post("/v1/chat/completions", json={"model": "sql", "messages": MESSAGES}, headers=headers)
            assert answer.status_code == 401
        assert http.get("/health").status_code == 200


def test_a_key_with_another_keys_secret_is_refused(client_of, accounts):
    one, other = accounts.new_key("acme").text, accounts.new_key("acme").text
    mixed = "-".join([*one.split("-")[:2], other.split("-", 2)[2]])
    with pytest.raises(openai.AuthenticationError):
        client_of("acme", mixed).models.list()


def test_what_changes_in_the_file_acts_on_the_next_request(client_of, accounts):
    accounts.add(Account("newcomer"))
    key = accounts.new_key("newcomer").text
    client = client_of("newcomer", key)
    with pytest.raises(openai.NotFoundError):
        asked(client)
    accounts.grant("newcomer", ["sql"])
    asked(client)
    accounts.withdraw("newcomer", ["sql"])
    with pytest.raises(openai.NotFoundError):
        asked(client)
    accounts.revoke_key(key)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    again = client_of("newcomer")
    accounts.remove("newcomer")
    with pytest.raises(openai.AuthenticationError):
        again.models.list()


def test_a_prompt_is_not_shown_by_the_prefix_cache(client_of):
    """Of the same prompt to the base another tenant cannot tell that it was asked before."""
    prompt = "A long secret that only one tenant knows. " * 12

    def cached(client):
        answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    acme, rival = client_of("acme"), client_of("rival")
    assert cached(acme) == 0 and cached(acme) > 0 and cached(rival) == 0


def test_a_salt_of_its_own_does_not_reach_into_anothers(client_of, accounts):
    """Whatever names and salts are, two tenants have no common prefix."""
    for name in ("a", "a/b", 'a", "b'):
        accounts.add(Account(name))
    prompt = "One more secret that only one tenant knows. " * 12

    def cached(client, salt):
        options = {"cache_salt": salt} if salt else {}
        answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=1, extra_body=options)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached(client_of("a/b"), "") == 0 and cached(client_of('a", "b'), "") == 0
    for salt in ("b/", "b", "/b", 'b", "', '", "b'):
        assert cached(client_of("a"), salt) == 0
    assert cached(client_of("a/b"), "") > 0


# How much


def test_requests_of_a_minute(client_of, accounts):
    accounts.add(Account("busy", requests_per_minute=3))
    client = client_of("busy")
    for _ in range(3):
        asked(client, BASE)
    with pytest.raises(openai.RateLimitError) as error:
        asked(client, BASE)
    assert error.value.code == "rate_limit_exceeded"
    assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
    asked(client_of("acme"))
    with pytest.raises(openai.RateLimitError):  # never possible, and nothing of it is counted
        asked(client, BASE, n=4, temperature=1)


def test_tokens_of_a_day_are_kept_while_requests_run_and_given_back(client_of, accounts, app):
    accounts.add(Account("poor", tokens_per_day=300))
    accounts.record([Used(today(), "poor", "", 1, 50, 50), Used("2020-01-01", "poor", "", 1, 900, 0)])
    client = client_of("poor")
    with pytest.raises(openai.RateLimitError) as error:
        asked(client, BASE, max_tokens=250)
    assert error.value.code == "insufficient_quota" and "100 are used" in str(error.value)
    stream = asked(client, BASE, max_tokens=150, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="asked for"):
        asked(client, BASE, max_tokens=60)
    stream.close()  # what it did not take is free again
    until(lambda: app.served.engine.stats().open == 0)
    assert asked(client, BASE, max_tokens=4).usage.completion_tokens <= 4


def test_sequences_that_may_run_and_wait(client_of, accounts, app):
    accounts.add(Account("narrow", max_running=1, max_waiting=1))
    client = client_of("narrow")
    options = {"max_tokens": 300, "stream": True, "extra_body": {"ignore_eos": True}}
    streams = [asked(client, BASE, **options)]
    next(iter(streams[0]))
    streams.append(asked(client, BASE, **options))
    with pytest.raises(openai.RateLimitError) as error:
        asked(client, BASE)
    assert error.value.code == "engine_busy" and "narrow" in str(error.value)
    stats = app.served.engine.stats().tenants["narrow"]
    assert (stats.running, stats.waiting) == (1, 1)
    for stream in streams:
        stream.close()
    until(lambda: app.served.engine.stats().open == 0)


# What is written


def test_usage_is_written_as_it_was_told(client_of, accounts):
    accounts.add(Account("counted"))
    accounts.grant("counted", ["sql"])
    client = client_of("counted")
    told = [asked(client, model, max_tokens=6).usage for model in ("sql", "sql", BASE)]
    chunks = list(asked(client, "sql", stream=True, stream_options={"include_usage": True}))
    told.insert(0, chunks[-1].usage)
    until(lambda: sum(one.requests for one in accounts.usage(tenant="counted")) == 4)
    base, sql = accounts.usage(tenant="counted")
    assert (base.adapter, sql.adapter) == ("", "sql") and base.day == today()
    assert base[3:] == (1, told[3].prompt_tokens, told[3].completion_tokens)
    assert sql[3:] == (
        3,
        *(sum(getattr(one, name) for one in told[:3]) for name in ("prompt_tokens", "completion_tokens")),
    )
    assert accounts.tokens_used("counted", today()) == base.tokens + sql.tokens
    assert accounts.usage(tenant="counted", since="2999-01-01") == []


def test_usage_waits_for_a_file_that_is_locked(client_of, accounts):
    """Another process may write; nobody's answer waits for it."""
    accounts.add(Account("late"))
    client, other = client_of("late"), Accounts(accounts.path)
    with other._changing():
        for _ in range(2):
            began = time.monotonic()
            asked(client, BASE)
            assert time.monotonic() - began < 5
        assert accounts.usage(tenant="late") == []
    other.close()
    until(lambda: sum(one.requests for one in accounts.usage(tenant="late")) == 2)


def test_keys_are_kept_as_hashes(accounts):
    key = accounts.new_key("acme")
    secret = keys.split(key.text)[1]
    written = b"".join(path.read_bytes() for path in accounts.path.parent.iterdir())
    assert key.id.encode() in written and secret.encode() not in written and key.text.encode() not in written
    assert accounts.path.stat().st_mode & 0o077 == 0
    assert len({accounts.new_key("acme").text for _ in range(50)}) == 50


def test_accounts_of_several_threads(accounts):
    accounts.add(Account("threads"))

    def record():
        for _ in range(25):
            accounts.record([Used(today(), "threads", "a", 1, 2, 3)])

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accounts.usage(tenant="threads")[0][3:] == (200, 400, 600)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda accounts: accounts.add(Account("acme")), "already"),
        (lambda accounts: accounts.add(Account("")), "''"),
        (lambda accounts: accounts.add(Account("*")), r"\*"),
        (lambda accounts: accounts.add(Account("a\nb")), "printable"),
        (lambda accounts: accounts.add(Account("x", tokens_per_day=0)), "tokens_per_day"),
        (lambda accounts: accounts.change(Account("nobody")), "no tenant 'nobody'"),
        (lambda accounts: accounts.remove("nobody"), "no tenant 'nobody'"),
        (lambda accounts: accounts.new_key("nobody"), "no tenant 'nobody'"),
        (lambda accounts: accounts.grant("nobody", ["sql"]), "no tenant 'nobody'"),
        (lambda accounts: accounts.withdraw("acme", ["sql", "never"]), "never"),
        (lambda accounts: accounts.revoke_key("never"), "never"),
    ],
)
def test_mistakes_change_nothing(accounts, wrong, match):
    before = accounts.all(), accounts.adapters_of("acme")
    with pytest.raises(AccountError, match=match):
        wrong(accounts)
    assert (accounts.all(), accounts.adapters_of("acme")) == before


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(AccountError, match="lorakit tenants add"):
        Accounts(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(AccountError, match="text.db"):
        Accounts(tmp_path / "text.db")
    with pytest.raises(AccountError, match="missing"):
        Accounts(tmp_path / "missing" / "tenants.db", create=True)


def test_the_command(tmp_path):
    def run(*arguments, code=0):
        command = [sys.executable, "-m", "lorakit", "tenants", *arguments, "--file", str(tmp_path / "t.db")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    key = run("add", "acme", "sql", "--weight", "2", "--tokens-per-day", "1000").strip()
    accounts = Accounts(tmp_path / "t.db")
    assert accounts.owner_of(key) == Account("acme", weight=2.0, tokens_per_day=1000)
    run("set", "acme", "--tokens-per-day", "0", "--max-running", "3")
    assert accounts.get("acme") == Account("acme", weight=2.0, max_running=3)
    run("publish", "poet")
    run("grant", "acme", "clerk")
    run("withdraw", "acme", "sql")
    assert accounts.adapters_of("acme") == {"clerk", "poet"}
    more = run("key", "acme").strip()
    run("revoke", key)
    assert accounts.owner_of(key) is None and accounts.owner_of(more).name == "acme"
    accounts.record([Used(today(), "acme", "poet", 2, 30, 40)])
    assert json.loads(run("usage", "--json"))["generated_tokens"] == 40
    assert "poet" in run("usage", "acme") and "clerk" in run("list")
    run("remove", "acme")
    assert accounts.all() == [] and accounts.owner_of(more) is None and "poet" in run("usage")
    assert "no tenant 'acme'" in run("key", "acme", code=2)
    assert "nothing is to be set" in run("set", "acme", code=2)


def test_weights_reach_the_engine(client_of, accounts, app):
    accounts.add(Account("heavy", weight=7.5, max_waiting=9))
    asked(client_of("heavy"), BASE)
    policy = app.served.engine._tenants.policy("heavy")
    assert (policy.weight, policy.max_waiting) == (7.5, 9)
    assert EngineConfig().default_tenant.weight == 1.0
