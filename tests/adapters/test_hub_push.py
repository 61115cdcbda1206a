"""Banks are pushed by the real huggingface_hub to a Hub on loopback: what is uploaded, written and refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from forms import BASE, assert_same_form, lora_form, make_bank, odd_form
from huggingface_hub import ModelCard
from loopback_hub import OWNER, READER, File, LoopbackHub, Repo
from peft_folders import base_of, save, small
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import lorakit
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.index import Index
from lorakit.adapters.model_card import BEGIN, END
from lorakit.adapters.push import published
from lorakit.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BankError,
    BaseModelMismatchError,
    BaseModelNotFoundError,
    ConfigError,
    HubAccessError,
    HubError,
)

FORMS = {"a": lora_form(0), "b": odd_form(1), "c": lora_form(2, rank=8)}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as served, served.here(monkeypatch, tmp_path / "home"):
        yield served


@pytest.fixture
def bank(tmp_path) -> AdapterBank:
    """Three adapters in a shard each."""
    made = make_bank(tmp_path / "bank", a=FORMS["a"])
    for name in "bc":
        made.add_forms([(name, FORMS[name], f"runs/{name}")])
    return made


def held(hub: LoopbackHub, repo_id: str = "me/bank") -> set[str]:
    return hub.repos[repo_id].files.keys() - {".gitattributes"}


def card_of(hub: LoopbackHub, repo_id: str = "me/bank") -> ModelCard:
    return ModelCard(hub.repos[repo_id].files["README.md"].data.decode())


def check_whole(hub: LoopbackHub, bank: AdapterBank, repo_id: str = "me/bank") -> None:
    """The repository holds the bank and nothing else of one, by every commit of it."""
    for files in hub.repos[repo_id].commits.values():
        if "bank.json" in files and files["bank.json"].data != b"{}":
            index = Index.parse(files["bank.json"].data)
            assert index.shards.keys() == {name for name in files if name.startswith("bank-")}
            assert all(len(files[name].data) == facts.nbytes for name, facts in index.shards.items())
    files = hub.repos[repo_id].files
    assert Index.parse(files["bank.json"].data).adapters.keys() == set(bank)
    for entry in bank.values():
        assert files[entry.shard].data == (bank.path / entry.shard).read_bytes()


# ---- what is uploaded


def test_a_push_and_its_commit(hub, bank):
    commit = bank.push_to_hub("me/bank", commit_message="first")
    assert held(hub) == {"bank.json", "README.md", *(entry.shard for entry in bank.values())}
    check_whole(hub, bank)
    assert commit.oid == hub.repos["me/bank"].branches["main"] and commit.commit_url.endswith(commit.oid)
    assert commit.commit_message == "first"
    assert len(hub.repos["me/bank"].commits) == 2, "one is the repository's own"
    for name, form in FORMS.items():
        assert_same_form(AdapterBank.from_pretrained("me/bank").form(name), form)


def test_what_is_there_is_not_uploaded_again(hub, bank):
    first = bank.push_to_hub("me/bank")
    hub.calm()
    assert bank.push_to_hub("me/bank").oid == first.oid
    assert not hub.uploads() and len(hub.repos["me/bank"].commits) == 2
    bank.add_forms([("d", lora_form(4), "")])
    bank.push_to_hub("me/bank")
    assert hub.uploads() == [hub.repos["me/bank"].files[bank["d"].shard].oid]
    check_whole(hub, bank)


def test_a_copy_of_what_was_pulled_is_pushed_as_its_change(hub, bank, tmp_path):
    bank.push_to_hub("me/bank")
    hub.calm()
    copy = AdapterBank.from_pretrained("me/bank").copy(tmp_path / "copy")
    copy.add_forms([("d", lora_form(4), "")])
    copy.push_to_hub("me/bank")
    assert hub.uploads() == [hub.repos["me/bank"].files[copy["d"].shard].oid]
    check_whole(hub, copy)
    # A pulled bank can be pushed elsewhere as it is.
    AdapterBank.from_pretrained("me/bank").push_to_hub("me/other")
    check_whole(hub, copy, "me/other")


def test_what_was_removed_is_not_published(hub, tmp_path):
    bank = make_bank(tmp_path / "bank", **FORMS)
    secret = bytes(bank.read("b").weights.untyped_storage())[:64]
    bank.remove("b")
    bank.push_to_hub("me/bank")
    check_whole(hub, bank)
    assert not any(
        secret in data for data in [*hub.objects.values(), *(f.data for f in hub.repos["me/bank"].files.values())]
    )
    some = AdapterBank.from_pretrained(bank.path, adapters=["a"])
    with pytest.raises(BankError, match=r"cannot be changed here: copy it"):
        some.push_to_hub("me/other")
    assert "me/other" not in hub.repos
    some.copy(tmp_path / "some").push_to_hub("me/other")
    check_whole(hub, AdapterBank.open(tmp_path / "some"), "me/other")


def test_adapters_that_others_pushed_are_not_lost(hub, bank, tmp_path):
    bank.push_to_hub("me/bank")
    for other, error in (
        (make_bank(tmp_path / "one", d=lora_form(7)), AdapterExistsError),
        (AdapterBank.from_pretrained("me/bank", adapters=["a", "b"]).copy(tmp_path / "two"), AdapterExistsError),
        (AdapterBank.create(tmp_path / "three", **BASE), AdapterExistsError),
    ):
        hub.calm()
        with pytest.raises(error, match=r"'me/bank' holds adapters that this bank lacks: .*c.*overwrite=True"):
            other.push_to_hub("me/bank")
        assert not hub.uploads()
    base = {**BASE, "fingerprint": {"hidden_size": 99}}
    stranger = AdapterBank.create(tmp_path / "four", **base)
    stranger.add_forms([(name, form, "") for name, form in FORMS.items()])
    with pytest.raises(BaseModelMismatchError, match="'me/bank' holds a bank of another base"):
        stranger.push_to_hub("me/bank")
    check_whole(hub, bank)
    one = AdapterBank.open(tmp_path / "one")
    one.push_to_hub("me/bank", overwrite=True)
    check_whole(hub, one)


def test_a_bank_that_cannot_be_read_there(hub, bank):
    bank.push_to_hub("me/bank")
    hub.edit("me/bank", "bank.json", b"{}")
    with pytest.raises(BankError, match=r"'me/bank' holds a bank that cannot be read.*overwrite=True"):
        bank.push_to_hub("me/bank")
    bank.push_to_hub("me/bank", overwrite=True)
    check_whole(hub, bank)


# ---- failures


@pytest.mark.parametrize(
    "fault",
    [{"cut": 700}, {"status": 500}, {"status": 503}, {"status": 429, "headers": {"Retry-After": "3"}}],
    ids=["cut", "500", "503", "429"],
)
@pytest.mark.parametrize("part_bytes", [None, 1000], ids=["whole", "parts"])
def test_an_upload_that_fails_is_tried_again(hub, bank, fault, part_bytes):
    hub.part_bytes = part_bytes
    hub.fail("PUT /lfs/", **fault, times=2, after=1)
    bank.push_to_hub("me/bank")
    check_whole(hub, bank)
    assert len(hub.waits) == 2
    if fault.get("status") == 429:
        assert all(wait >= 3 for wait in hub.waits), "as long as the Hub says"


@pytest.mark.parametrize("fault", [{"cut": 10}, {"status": 503}, {"status": 429}], ids=["cut", "503", "429"])
def test_after_an_error_a_push_goes_on(hub, bank, fault):
    bank.push_to_hub("me/bank")
    bank.add_forms([("d", lora_form(4), "")])
    bank.add_forms([("e", lora_form(5), "")])
    hub.calm()
    oid = {name: (bank.path / bank[name].shard).read_bytes() for name in "de"}

    e = hashlib.sha256(oid["e"]).hexdigest()
    hub.fail(f"PUT /lfs/{e}", **fault, times=100)
    with pytest.raises(HubError, match="'me/bank'.*what has arrived is kept"):
        bank.push_to_hub("me/bank")
    check_whole(hub, AdapterBank.from_pretrained("me/bank"))
    assert "d" not in AdapterBank.from_pretrained("me/bank"), "no commit names what is not there"
    hub.calm()
    bank.push_to_hub("me/bank")
    assert hub.uploads() == [e]
    check_whole(hub, bank)


def test_an_object_whose_hash_does_not_match(hub, bank, monkeypatch):
    from huggingface_hub import lfs

    real = lfs.UploadInfo.sha256.fget
    wrong = property(
        lambda info: bytes(32) if info.size == (bank.path / bank["b"].shard).stat().st_size else real(info)
    )
    with monkeypatch.context() as patch:
        patch.setattr(lfs.UploadInfo, "sha256", wrong)
        with pytest.raises(HubError, match=r"refuses this for 'me/bank'.*hash does not match"):
            bank.push_to_hub("me/bank")
    assert not held(hub)
    bank.push_to_hub("me/bank")
    check_whole(hub, bank)


@pytest.mark.parametrize(
    "route", ["GET /api/models/me/bank", "POST /api/repos", "POST .*/commit/", "POST .*/preupload/"]
)
def test_a_hub_in_trouble(hub, bank, route):
    hub.fail(route, status=500, times=100)
    with pytest.raises(HubError, match="status 500, for 'me/bank'"):
        bank.push_to_hub("me/bank")
    hub.faults.clear()
    bank.push_to_hub("me/bank")
    check_whole(hub, bank)


def test_two_pushes_at_once(hub, bank):
    bank.push_to_hub("me/bank")
    bank.add_forms([("d", lora_form(4), "")])
    hub.fail("POST /api/validate-yaml", status=200, call=lambda: hub.edit("me/bank", "notes.txt", b"mine"))
    with pytest.raises(HubError, match="'me/bank' was changed while it was pushed to: push again"):
        bank.push_to_hub("me/bank")
    assert "d" not in AdapterBank.from_pretrained("me/bank")
    bank.push_to_hub("me/bank")
    check_whole(hub, bank)
    assert hub.repos["me/bank"].files["notes.txt"].data == b"mine"


def test_a_bank_that_changes_while_it_is_pushed(hub, tmp_path):
    bank = make_bank(tmp_path / "bank", **FORMS)

    def change() -> None:
        other = AdapterBank.open(tmp_path / "bank")
        other.remove("a")
        other.add_forms([("d", lora_form(4), "")])
        other.compact()

    hub.fail("POST .*/preupload/", call=change)
    bank.push_to_hub("me/bank")
    assert bank.names == ["b", "c", "d"]
    check_whole(hub, bank)
    hub.fail("POST .*/preupload/", call=lambda: _again(tmp_path / "bank"), times=100)
    with pytest.raises(BankError, match="changes too fast to be pushed"):
        bank.push_to_hub("me/bank", overwrite=True)
    check_whole(hub, AdapterBank.from_pretrained("me/bank"))


def _again(path: Path) -> None:
    bank = AdapterBank.open(path)
    bank.add_forms([("d", lora_form(len(bank)), "")], overwrite=True)
    bank.add_forms([("b", odd_form(1), ""), ("c", lora_form(1), "")], overwrite=True)


# ---- where and by whom


def test_branches_and_pull_requests(hub, bank):
    bank.push_to_hub("me/bank", revision="v2")
    repo = hub.repos["me/bank"]
    assert "bank.json" not in repo.files and AdapterBank.from_pretrained("me/bank", revision="v2").names == bank.names
    assert 'revision="v2"' in repo.commits[repo.branches["v2"]]["README.md"].data.decode()
    bank.push_to_hub("me/bank")
    bank.add_forms([("d", lora_form(4), "")])
    commit = bank.push_to_hub("me/bank", create_pr=True)
    assert commit.pr_url.endswith("discussions/1") and "d" not in AdapterBank.from_pretrained("me/bank")
    assert "d" in AdapterBank.from_pretrained("me/bank", revision="refs/pr/1")


def test_private_repositories_and_tokens(hub, bank, monkeypatch, tmp_path):
    bank.push_to_hub("me/bank", private=True)
    assert hub.repos["me/bank"].private
    bank.push_to_hub("me/open")
    assert not hub.repos["me/open"].private
    bank.add_forms([("d", lora_form(4), "")])
    for token, repo_id in ((READER, "me/bank"), (READER, "me/open"), (READER, "me/new"), (False, "me/open")):
        with pytest.raises(HubAccessError, match=rf"refuses this for '{repo_id}'.*hf auth login"):
            bank.push_to_hub(repo_id, token=token)
    with pytest.raises(HubAccessError, match="Invalid"):
        bank.push_to_hub("me/open", token="hf_wrong")
    with hub.here(monkeypatch, tmp_path / "other", token=None):
        with pytest.raises(HubAccessError):
            bank.push_to_hub("me/open")
        bank.push_to_hub("me/open", token=OWNER)
    assert {r.token for r in hub.requests if r.method == "PUT"} == {None}, "objects go to another host"


def test_arguments_that_cannot_be(hub, bank):
    for repo_id in ("bank", "a/b/c", "", "me/ba nk"):
        with pytest.raises(ConfigError, match="no repository's id; write it as 'user/bank'"):
            bank.push_to_hub(repo_id)
    for base in ("", "base", "/models/base"):
        with pytest.raises(ConfigError, match="base_model=.* is no Hub id"):
            bank.push_to_hub("me/bank", base_model=base)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'zebra'"):
        bank.push_to_hub("me/bank", scores={"zebra": 1})
    assert not hub.requests


# ---- the card


def test_the_card_says_what_is_known(hub, bank):
    hub.repos["org/base"] = Repo(gated=True)
    hub.commit("org/base", "main", {})
    bank.push_to_hub("me/bank", scores={"a": 0.9375, "c": "91 % | exact match"})
    card = card_of(hub)
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "lorakit",
        "tags": ["lorakit", "peft", *sorted({form.method for form in FORMS.values()})],
    }
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert rows == [
        "| adapter | method | rank | size | score |",
        "| --- | --- | ---: | ---: | ---: |",
        "| `a` | lora | 4 | 3.1 kB | 0.9375 |",
        rows[3],
        "| `c` | lora | 8 | 6.1 kB | 91 % \\| exact match |",
    ]
    assert rows[3].startswith(f"| `b` | {FORMS['b'].method} | {'/'.join(map(str, bank['b'].ranks))} |")
    bank.push_to_hub("me/bank")
    assert "score" not in card_of(hub).text


def test_a_base_that_the_hub_does_not_know_is_not_named(hub, bank, caplog):
    bank.push_to_hub("me/bank")
    assert "base_model" not in card_of(hub).data.to_dict() and "org/base" not in card_of(hub).text
    assert "names no base model" in caplog.text and "'org/base'" in caplog.text
    bank.push_to_hub("me/bank", base_model="org/tiny")
    assert card_of(hub).data.to_dict()["base_model"] == "org/tiny"
    assert AdapterBank.from_pretrained("me/bank").base_id == "org/tiny"


def test_what_a_person_wrote_is_kept(hub, bank):
    hub.repos["me/bank"] = Repo()
    head = "license: mit\ntags:\n- mine\nlibrary_name: other\nbase_model:\n- org/one\n- org/two"
    readme = f"---\n{head}\n---\n# Ours\n\nText.\n"
    hub.commit("me/bank", "main", {"README.md": File(readme.encode(), False), "notes.txt": File(b"x", False)})
    bank.push_to_hub("me/bank", base_model="org/tiny")
    card = card_of(hub)
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["base_model"]) == ("mit", "other", "org/tiny")
    assert data["tags"][0] == "mine" and "lorakit" in data["tags"]
    assert card.text.lstrip().startswith("# Ours\n\nText.\n\n" + BEGIN) and card.text.rstrip().endswith(END)
    hub.edit("me/bank", "README.md", str(card).replace("Text.", "Other text.").encode() + b"\nAfter.\n")
    bank.add_forms([("d", lora_form(4), "")])
    bank.push_to_hub("me/bank")
    text = card_of(hub).text
    assert "Other text." in text and text.rstrip().endswith(END + "\n\nAfter.") and text.count(BEGIN) == 1
    assert "| `d` |" in text and "org/tiny" not in text.split("## Use")[0].split("| adapter")[0]
    assert held(hub) >= {"notes.txt"}


@pytest.mark.parametrize("head", ["- a\n- b", "a: [", "model-index: 3"])
def test_a_card_that_cannot_be_read(hub, bank, head):
    hub.repos["me/bank"] = Repo()
    hub.commit("me/bank", "main", {"README.md": File(f"---\n{head}\n---\ntext".encode(), False)})
    with pytest.raises(BankError, match=r"README.md of 'me/bank' has metadata that cannot be read.*mend it there"):
        bank.push_to_hub("me/bank")
    assert not hub.uploads() and held(hub) == {"README.md"}


# ---- paths of this machine


def test_no_path_of_this_machine_is_published(hub, tmp_path):
    home = tmp_path / "alice"
    base_of().save_pretrained(home / "base")
    tenant = small(1)
    tenant.peft_config["default"].base_model_name_or_path = str(home / "base")
    bank = lorakit.export({"sql": save(tenant, home / "sql")}, home / "bank", base_model=home / "base")
    bank.push_to_hub("me/bank", include_peft=True)
    for name, file in hub.repos["me/bank"].files.items():
        assert b"alice" not in file.data and str(tmp_path).encode() not in file.data, name
    pulled = AdapterBank.from_pretrained("me/bank")
    assert (pulled.base_id, pulled["sql"].source) == ("", "sql")
    with pytest.raises(BaseModelNotFoundError):
        pulled.add("x", home / "sql")
    assert bank.base_id == str(home / "base"), "the bank here stays as it is"
    bank.push_to_hub("me/bank", base_model="org/tiny")
    config = json.loads(hub.repos["me/bank"].files["adapters/sql/adapter_config.json"].data)
    assert config["base_model_name_or_path"] == "org/tiny" == AdapterBank.from_pretrained("me/bank").base_id


def test_what_is_published_of_an_index(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = make_bank(tmp_path / "bank", a=lora_form(0), b=lora_form(1))._folder.index
    sources = {"a": "org/lora", "b": "C:\\Users\\alice\\b"}
    index = replace(index, adapters={n: replace(e, source=sources[n]) for n, e in index.adapters.items()})
    found = published(index, None)
    assert (found.base_id, found.adapters["a"].source) == ("org/base", "org/lora") and found.adapters[
        "a"
    ] == index.adapters["a"]
    assert "alice" not in found.adapters["b"].source
    assert published(replace(index, base_id="~/base"), None).base_id == ""
    (tmp_path / "base").mkdir()
    assert published(replace(index, base_id="base"), None).base_id == ""
    assert (
        found.adapters["a"].config is found.adapters["b"].config
        or found.adapters["a"].config == found.adapters["b"].config
    )


# ---- PEFT's folders, and the card's programs


def test_peft_folders_come_and_go(hub, tmp_path):
    folders = {name: save(small(seed), tmp_path / name) for seed, name in enumerate(["sql", "law"])}
    base_of().save_pretrained(tmp_path / "base")
    bank = lorakit.export(folders, tmp_path / "bank", base_model=tmp_path / "base")
    bank.push_to_hub("me/bank")
    assert not any(name.startswith("adapters/") for name in held(hub))
    bank.push_to_hub("me/bank", include_peft=True)
    peft = {f"adapters/{n}/{f}" for n in folders for f in ("adapter_config.json", "adapter_model.safetensors")}
    assert held(hub) >= peft
    for name, folder in folders.items():
        saved = (folder / "adapter_model.safetensors").read_bytes()
        assert hub.repos["me/bank"].files[f"adapters/{name}/adapter_model.safetensors"].data == saved
    hub.calm()
    bank.push_to_hub("me/bank")
    assert not hub.uploads() and held(hub) >= peft, "they stay without being asked for"
    bank.remove("law")
    bank.push_to_hub("me/bank", overwrite=True)
    assert {name for name in held(hub) if name.startswith("adapters/")} == {n for n in peft if "/sql/" in n}
    bank.push_to_hub("me/bank", include_peft=False)
    assert not any(name.startswith("adapters/") for name in held(hub))


_PROGRAM = """
import sys, torch
from huggingface_hub import hf_hub_download, ModelCard
text = ModelCard(open(hf_hub_download("me/bank", "README.md")).read()).text
blocks = [part.split("```")[0] for part in text.split("```python\\n")[1:]]
assert len(blocks) == 2
for block in blocks:
    exec(block, names := globals())
    if "output" in names:
        mixed, tokens = names["model"], names.pop("output")
assert tokens.shape[0] == 2
ids = torch.randint(3, 60, (1, 7))
for name in ("sql", "law"):
    fresh = type(base).from_pretrained("org/base")
    alone = PeftModel.from_pretrained(fresh, "me/bank", subfolder=f"adapters/{name}").eval()
    with torch.no_grad():
        theirs = alone.double()(ids).logits
        ours = mixed(ids.repeat(2, 1), adapter_ids=[None, name]).logits
    assert (ours[1].double() - theirs[0]).norm() / theirs.norm() < 2e-5, name
    assert (ours[0].double() - theirs[0]).norm() / theirs.norm() > 1e-3, name
print("ran", [len(block.splitlines()) for block in blocks])
"""


@pytest.mark.slow
def test_the_cards_programs_run_and_peft_reads_its_subfolders(hub, tmp_path):
    base = base_of()
    base.save_pretrained(tmp_path / "base")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "Hello": 3}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        tmp_path / "base"
    )
    hub.add_folder("org/base", tmp_path / "base")
    folders = {
        name: save(small(seed, use_dora=name == "law"), tmp_path / name) for seed, name in enumerate(["sql", "law"])
    }
    bank = lorakit.export(folders, tmp_path / "bank", base_model=tmp_path / "base")
    bank.push_to_hub("me/bank", include_peft=True, base_model="org/base")
    assert card_of(hub).data.to_dict()["pipeline_tag"] == "text-generation"
    environment = {**os.environ, **hub.environment(tmp_path / "fresh", token=READER)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and re.search(r"^ran \[\d+, \d+\]$", done.stdout, re.MULTILINE), (
        done.stdout + done.stderr
    )
