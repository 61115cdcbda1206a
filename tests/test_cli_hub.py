"""The commands that push to, pull from and read banks on a Hub; it is one on loopback."""

import sys
from pathlib import Path

import pytest
from architectures import ARCHITECTURES, adapt
from loopback_hub import LoopbackHub

import lorakit
from lorakit import cli
from lorakit.adapters.bank import AdapterBank
from lorakit.server.serve import Settings, load


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base, two adapters and their bank, in the folder that commands run in."""
    base = ARCHITECTURES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(["sql", "law"]):
        adapt(base, seed, target_modules=["q_proj"]).save_pretrained(tmp_path / name)
    lorakit.export([tmp_path / "sql", tmp_path / "law"], tmp_path / "bank", base_model=tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def hub(place, monkeypatch):
    with LoopbackHub() as served, served.here(monkeypatch, place / "home"):
        yield served


def run(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lorakit", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


def test_from_push_to_pull(place, hub, capsys, monkeypatch):
    options = ("--base", "org/base", "--score", "sql=0.9", "--private", "-m", "first", "--include-peft")
    code, out, _ = run(capsys, monkeypatch, "push", "bank", "me/bank", *options)
    repo = hub.repos["me/bank"]
    assert (code, out.strip()) == (0, f"{hub.url}/me/bank/commit/{repo.branches['main']}")
    readme = repo.files["README.md"].data.decode()
    assert repo.private and "base_model: org/base" in readme and "| 0.9 |" in readme
    assert "adapters/law/adapter_config.json" in repo.files
    hub.calm()
    code, out, _ = run(capsys, monkeypatch, "inspect", "me/bank")
    assert code == 0 and "me/bank: 2 adapters of org/base" in out and not hub.sent("/cdn/")
    code, out, _ = run(capsys, monkeypatch, "inspect", "me/bank", "sql")
    assert code == 0 and "q_proj" in out
    code, out, _ = run(capsys, monkeypatch, "verify", "me/bank", "law")
    assert (code, out) == (0, "1 adapters are sound.\n") and len(hub.ranges()) == 1
    code, out, _ = run(capsys, monkeypatch, "export-peft", "me/bank", "sql", "out")
    assert code == 0 and len(hub.ranges()) == 2
    name = "adapter_model.safetensors"
    assert (place / "out" / name).read_bytes() == (place / "sql" / name).read_bytes()
    code, out, _ = run(capsys, monkeypatch, "pull", "me/bank", "mine", "-a", "law")
    assert code == 0 and "mine: 1 adapters of org/base" in out
    assert AdapterBank.open(place / "mine").names == ["law"]


def test_mistakes(place, hub, capsys, monkeypatch):
    for arguments, sentence in (
        (("push", "nothing", "me/bank"), "is no folder"),
        (("push", "bank", "bank"), "write it as 'user/bank'"),
        (("push", "bank", "me/bank", "--score", "sql"), "is no NAME=VALUE"),
        (("push", "bank", "me/bank", "--score", "sql=1", "--score", "sql=2"), "has two scores"),
        (("inspect", "me/bank"), "shows no repository 'me/bank'"),
        (("serve", "base", "--bank", "me/bank"), "shows no repository 'me/bank'"),
        (("generate", "me/bank", "hello"), "shows no repository 'me/bank'"),
        (("pull", "me/bank", "bank"), "holds a bank already"),
        (("inspect", "bank", "--revision", "main"), "leave it out"),
    ):
        code, out, err = run(capsys, monkeypatch, *arguments)
        assert code == 2 and sentence in " ".join(err.split()) and not out, (arguments, err)
    assert not hub.repos


def test_models_take_a_hub_id(place, hub):
    AdapterBank.open(place / "bank").push_to_hub("me/bank", base_model="org/base")
    assert lorakit.MultiLoraModel.from_pretrained(place / "base", "me/bank").adapters == ["sql", "law"]


def test_the_server_takes_a_hub_id(place, hub, monkeypatch):
    bank = AdapterBank.open(place / "bank")
    bank.push_to_hub("me/bank", revision="v1")
    opened = []
    real = AdapterBank.from_pretrained

    def seen(*args, **kwargs):
        opened.append((args, kwargs))
        return real(*args, **kwargs)

    class Enough(Exception):
        pass

    def stop(*_args, **_kwargs):
        raise Enough

    monkeypatch.setattr(AdapterBank, "from_pretrained", seen)
    monkeypatch.setattr("lorakit.server.serve.read_tokenizer", lambda _: None)
    monkeypatch.setattr("lorakit.server.serve.MultiLoraModel.from_pretrained", stop)
    with pytest.raises(Enough):
        load(Settings(str(Path("base")), "me/bank", revision="v1"), lambda _: None)
    assert opened == [(("me/bank",), {"revision": "v1"})]
