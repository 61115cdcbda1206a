"""Banks are pulled by the real huggingface_hub from a Hub on loopback: what is fetched, kept, compared and refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forms import BASE, assert_same_form, lora_form, make_bank, odd_form
from huggingface_hub import close_session
from loopback_hub import OWNER, READER, File, LoopbackHub, Repo

from lorakit.adapters import pull
from lorakit.adapters.bank import AdapterBank
from lorakit.errors import (
    AdapterNameError,
    AdapterNotFoundError,
    BankCorruptedError,
    BankError,
    ConfigError,
    HubAccessError,
    HubError,
    HubNotFoundError,
)

FORMS = {"a": lora_form(0), "b": odd_form(1), "c": lora_form(2, rank=8), "d": lora_form(3)}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as served, served.here(monkeypatch, tmp_path / "home"):
        yield served


@pytest.fixture
def bank(hub, tmp_path) -> AdapterBank:
    """What `me/bank` holds: three adapters in one shard, and one in another. Requests are counted from here on."""
    made = make_bank(tmp_path / "bank", **{name: FORMS[name] for name in "abc"})
    made.add_forms([("d", FORMS["d"], "")])
    made.push_to_hub("me/bank")
    hub.calm()
    return made


def ranges_of(hub: LoopbackHub, bank: AdapterBank, *names: str) -> list[tuple[str, int, int]]:
    files = hub.repos["me/bank"].files
    return sorted((files[e.shard].oid, e.offset, e.offset + e.stored_nbytes) for e in (bank[name] for name in names))


def check(found: AdapterBank, *names: str) -> None:
    assert found.names == list(names)
    for name in names:
        assert_same_form(found.form(name), FORMS[name])


# ---- what is fetched


def test_only_the_named_adapters_ranges_are_fetched(hub, bank):
    found = AdapterBank.from_pretrained("me/bank", adapters=["d", "b"])
    check(found, "b", "d")
    assert hub.ranges() == ranges_of(hub, bank, "b", "d")
    index = len(hub.repos["me/bank"].files["bank.json"].data)
    assert hub.sent() == index + found["b"].stored_nbytes + found["d"].stored_nbytes
    found.verify()
    assert (found.base_id, found.fingerprint) == (bank.base_id, bank.fingerprint)
    assert {name: (e.method, e.config, e.source, e.blake3) for name, e in found.items()} == {
        name: (e.method, e.config, e.source, e.blake3) for name, e in bank.items() if name in "bd"
    }
    assert "me/bank" in repr(found)


def test_what_is_there_is_not_fetched_again(hub, bank):
    AdapterBank.from_pretrained("me/bank", adapters=["a"])
    hub.calm()
    check(AdapterBank.from_pretrained("me/bank", adapters=["a", "c"]), "a", "c")
    assert hub.ranges() == ranges_of(hub, bank, "c")
    hub.calm()
    # Others that the cache holds are not shown.
    check(AdapterBank.from_pretrained("me/bank", adapters=["a"]), "a")
    assert [(r.method, r.sent) for r in hub.requests] == [("HEAD", 0)]
    hub.calm()
    commit = hub.repos["me/bank"].branches["main"]
    check(AdapterBank.from_pretrained("me/bank", revision=commit, adapters=["c"]), "c")
    assert not hub.requests


def test_a_whole_bank_is_in_the_hubs_own_cache(hub, bank, tmp_path):
    found = AdapterBank.from_pretrained("me/bank")
    check(found, *"abcd")
    found.verify()
    assert found.path.is_relative_to(tmp_path / "home" / "hub") and not hub.ranges()
    assert not (found.path / "README.md").exists(), "only the bank's files are fetched"
    hub.calm()
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")
    check(AdapterBank.from_pretrained("me/bank", adapters=["c"]), "c")
    assert {r.method for r in hub.requests} == {"HEAD"}


def test_of_a_new_commit_what_did_not_change_is_not_fetched_again(hub, bank):
    old = AdapterBank.from_pretrained("me/bank", adapters=["a", "c"])
    bank.add_forms([("c", lora_form(9), ""), ("e", lora_form(10), "")], overwrite=True)
    bank.push_to_hub("me/bank")
    hub.calm()
    new = AdapterBank.from_pretrained("me/bank", adapters=["a", "c", "e"])
    assert hub.ranges() == ranges_of(hub, bank, "c", "e")
    assert_same_form(new.form("a"), FORMS["a"])
    assert_same_form(new.form("c"), lora_form(9))
    new.verify()
    check(old, "a", "c")
    old.reload()
    check(old, "a", "c")


def test_revisions(hub, bank):
    commit = hub.repos["me/bank"].branches["main"]
    hub.repos["me/bank"].branches["v1"] = commit
    bank.remove("a")
    bank.push_to_hub("me/bank", overwrite=True)
    for adapters in (None, ["b", "c"]):
        assert "a" not in AdapterBank.from_pretrained("me/bank", adapters=adapters)
        for revision in ("v1", commit):
            some = None if adapters is None else ["a", *adapters]
            assert "a" in AdapterBank.from_pretrained("me/bank", revision=revision, adapters=some)


def test_no_adapters_are_a_bank_too(hub, bank):
    assert len(AdapterBank.from_pretrained("me/bank", adapters=[])) == 0
    assert not hub.ranges()


# ---- failures


@pytest.mark.parametrize(
    "fault",
    [{"cut": 700}, {"status": 500}, {"status": 503}, {"status": 429, "headers": {"Retry-After": "3"}}],
    ids=["cut", "500", "503", "429"],
)
def test_a_range_that_fails_is_asked_for_again(hub, bank, fault):
    hub.fail("GET /cdn/", **fault, times=2)
    check(AdapterBank.from_pretrained("me/bank", adapters=["a", "b"]), "a", "b")
    assert len(hub.waits) == 2 and hub.requests
    if fault.get("status") == 429:
        assert all(wait >= 3 for wait in hub.waits), "as long as the Hub says"
    assert len(hub.ranges()) == 4 and set(hub.ranges()) == set(ranges_of(hub, bank, "a", "b"))


@pytest.mark.parametrize("fault", [{"cut": 100}, {"status": 503}, {"status": 429}], ids=["cut", "503", "429"])
def test_after_an_error_what_came_is_kept(hub, bank, monkeypatch, fault):
    monkeypatch.setattr(pull, "_REQUESTS", 1)
    hub.fail("GET /cdn/", **fault, times=100, after=2)
    with pytest.raises(HubError, match="'me/bank'.*what has arrived is kept"):
        AdapterBank.from_pretrained("me/bank", adapters=["a", "b", "c"])
    hub.calm()
    found = AdapterBank.from_pretrained("me/bank", adapters=["a", "b", "c"])
    check(found, *"abc")
    assert hub.ranges() == ranges_of(hub, bank, "c")
    found.verify()


def test_a_large_adapter_comes_in_blocks(hub, bank, monkeypatch):
    monkeypatch.setattr(pull, "BLOCK_BYTES", 1000)
    hub.fail("GET /cdn/", cut=10, after=1)
    check(AdapterBank.from_pretrained("me/bank", adapters=["c"]), "c")
    ((oid, begin, end),) = ranges_of(hub, bank, "c")
    blocks = [(oid, start, min(start + 1000, end)) for start in range(begin, end, 1000)]
    assert set(hub.ranges()) == set(blocks) and len(hub.ranges()) == len(blocks) + 1 > 3


def test_what_was_fetched_is_put_down_now_and_then(hub, bank, monkeypatch):
    monkeypatch.setattr(pull, "SHARD_BYTES", 1)
    found = AdapterBank.from_pretrained("me/bank", adapters=["a", "b", "d"])
    check(found, *"abd")
    assert found.info().shards == 3
    found.verify()


def test_a_hash_that_does_not_match(hub, bank):
    hub.fail("GET /cdn/", flip=100, after=1)
    with pytest.raises(BankCorruptedError, match=r"bank 'me/bank': adapter '[ab]' in bank-0001.*BLAKE3.*Open .* again"):
        AdapterBank.from_pretrained("me/bank", adapters=["a", "b"])
    check(AdapterBank.from_pretrained("me/bank", adapters=["a", "b"]), "a", "b")


def test_a_hash_that_does_not_match_in_a_whole_bank(hub, bank):
    place = bank["b"].offset + 5
    hub.fail(f"GET /cdn/{hub.repos['me/bank'].files['bank-0001.safetensors'].oid}", flip=place)
    with pytest.raises(BankCorruptedError, match="adapter 'b' in bank-0001.*BLAKE3"):
        AdapterBank.from_pretrained("me/bank")
    hub.calm()
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")
    assert len([r for r in hub.requests if r.path.startswith("/cdn/")]) == 1, "the other shard was kept"


def test_a_whole_bank_that_was_not_compared_is_not_used(hub, bank, monkeypatch):
    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(pull._Commit, "_compare", killed)
        hub.fail(f"GET /cdn/{hub.repos['me/bank'].files['bank-0001.safetensors'].oid}", flip=bank["b"].offset)
        with pytest.raises(KeyboardInterrupt):
            AdapterBank.from_pretrained("me/bank")
    with pytest.raises(BankCorruptedError, match="'b'"):
        AdapterBank.from_pretrained("me/bank")
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")


@pytest.mark.parametrize("fault", [{"cut": 5000}, {"status": 429, "headers": {"Retry-After": "0"}}], ids=["cut", "429"])
def test_a_whole_bank_over_a_bad_connection(hub, bank, fault):
    hub.fail("GET /cdn/", **fault, times=2)
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")
    assert hub.waits


def test_a_whole_bank_and_a_hub_in_trouble(hub, bank):
    hub.fail("GET /cdn/", status=503, times=100, after=1)
    with pytest.raises(HubError, match="status 503, for 'me/bank': try again"):
        AdapterBank.from_pretrained("me/bank")
    hub.calm()
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")
    assert len([r for r in hub.requests if r.path.startswith("/cdn/")]) == 1


# ---- what a repository may say


def edit_index(hub: LoopbackHub, change) -> None:
    index = json.loads(hub.repos["me/bank"].files["bank.json"].data)
    change(index)
    hub.edit("me/bank", "bank.json", json.dumps(index).encode())


@pytest.mark.parametrize("adapters", [None, ["d"]], ids=["whole", "named"])
@pytest.mark.parametrize("nbytes", [-1000, 100_000], ids=["shorter", "longer"])
def test_a_file_of_another_size(hub, bank, adapters, nbytes):
    shard = bank["d"].shard
    data = hub.repos["me/bank"].files[shard].data
    hub.edit("me/bank", shard, data[:nbytes] if nbytes < 0 else data + bytes(nbytes))
    with pytest.raises(BankCorruptedError, match=rf"bank 'me/bank'.*{shard}.*(another size|ends before)"):
        AdapterBank.from_pretrained("me/bank", adapters=adapters)


def test_a_range_behind_the_file(hub, bank):
    def change(index) -> None:
        index["shards"]["bank-0002.safetensors"]["nbytes"] = 1 << 40
        index["adapters"]["d"]["offset"] = 1 << 39

    edit_index(hub, change)
    with pytest.raises(BankCorruptedError, match="adapter 'd' in bank-0002"):
        AdapterBank.from_pretrained("me/bank", adapters=["d"])


def test_a_shard_that_is_not_there(hub, bank):
    hub.edit("me/bank", "bank-0002.safetensors", None)
    for adapters in (None, ["d"]):
        with pytest.raises(BankCorruptedError, match=r"bank 'me/bank'.*bank-0002"):
            AdapterBank.from_pretrained("me/bank", adapters=adapters)
    check(AdapterBank.from_pretrained("me/bank", adapters=["a"]), "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format_version=99),
        lambda index: index["adapters"]["a"].update(shard="../../../etc/passwd"),
        lambda index: index["shards"].update({"../evil": index["shards"].pop("bank-0001.safetensors")}),
        lambda index: index["adapters"]["a"].update(offset=index["adapters"]["b"]["offset"]),
        lambda index: index["adapters"].update({"../a": index["adapters"].pop("a")}),
        lambda index: index.clear(),
    ],
)
def test_an_index_that_cannot_be(hub, bank, change):
    edit_index(hub, change)
    with pytest.raises(BankError, match="repository 'me/bank' cannot be used"):
        AdapterBank.from_pretrained("me/bank", adapters=["a"])


def test_a_server_without_ranges(hub, bank):
    hub.has_ranges = False
    with pytest.raises(HubError, match="no ranges of bank-0001.*without `adapters`"):
        AdapterBank.from_pretrained("me/bank", adapters=["a"])
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")


def test_names_that_cannot_be(hub, bank, tmp_path):
    for place in ("me/bank", tmp_path / "bank"):
        with pytest.raises(AdapterNotFoundError, match="no adapter 'zebra'.*It holds a, b, c, d"):
            AdapterBank.from_pretrained(place, adapters=["a", "zebra"])
        with pytest.raises(AdapterNameError, match="'a' comes twice"):
            AdapterBank.from_pretrained(place, adapters=["a", "b", "a"])
        with pytest.raises(AdapterNotFoundError):
            AdapterBank.from_pretrained(place, adapters=[3])  # type: ignore[list-item]
        for wrong in ("a", 3):
            with pytest.raises(ConfigError, match="give a list of names"):
                AdapterBank.from_pretrained(place, adapters=wrong)  # type: ignore[arg-type]
    assert not hub.ranges()


# ---- refusals


def test_repositories_that_hold_no_bank(hub, bank):
    with pytest.raises(HubNotFoundError, match="shows no repository 'me/none'.*hf auth login") as found:
        AdapterBank.from_pretrained("me/none")
    assert isinstance(found.value, OSError) and isinstance(found.value, LookupError) and found.value.__cause__
    with pytest.raises(HubNotFoundError, match="'me/bank' has no revision 'v9'"):
        AdapterBank.from_pretrained("me/bank", revision="v9")
    hub.repos["me/empty"] = Repo()
    hub.commit("me/empty", "main", {})
    with pytest.raises(BankError, match=r"'me/empty' holds no bank.json.*push"):
        AdapterBank.from_pretrained("me/empty")
    hub.repos["me/lora"] = Repo()
    hub.commit("me/lora", "main", {"adapter_config.json": File(b"{}", False)})
    with pytest.raises(BankError, match=r"one PEFT adapter and no bank.*lorakit export FOLDER lora=me/lora"):
        AdapterBank.from_pretrained("me/lora", adapters=["a"])


def test_what_is_no_hub_id_is_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "./a/b", "a/b/c", "a/b/", "/a/b", "a--b/c"):
        with pytest.raises(BankError, match="is no folder"):
            AdapterBank.from_pretrained(name)
    make_bank(tmp_path / "me" / "bank", a=FORMS["a"])
    check(AdapterBank.from_pretrained("me/bank"), "a")
    check(AdapterBank.from_pretrained("me/bank", adapters=["a"]), "a")
    with pytest.raises(ConfigError, match=r"revision='main'.*leave it out"):
        AdapterBank.from_pretrained("me/bank", revision="main")
    with pytest.raises(BankError, match="is no folder"):
        AdapterBank.open("me/other")
    assert not hub.requests


def test_private_and_gated(hub, bank, monkeypatch, tmp_path):
    repo = hub.repos["me/bank"]
    for adapters in (None, ["a"]):
        repo.private, repo.gated = True, False
        for token in (READER, False):
            with pytest.raises(HubNotFoundError, match=r"'me/bank'.*private"):
                AdapterBank.from_pretrained("me/bank", adapters=adapters, token=token)
        repo.private, repo.gated = False, True
        for token in (READER, False):
            with pytest.raises(HubAccessError, match="'me/bank' is gated: ask for access") as found:
                AdapterBank.from_pretrained("me/bank", adapters=adapters, token=token)
            assert isinstance(found.value, PermissionError)
        with pytest.raises(HubAccessError, match=r"refuses this for 'me/bank'"):
            AdapterBank.from_pretrained("me/bank", adapters=adapters, token="hf_wrong")
    with hub.here(monkeypatch, tmp_path / "other", token=None):
        with pytest.raises(HubAccessError):
            AdapterBank.from_pretrained("me/bank")
        # What `hf auth login` saves.
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "token").write_text(OWNER)
        check(AdapterBank.from_pretrained("me/bank", adapters=["a"]), "a")
        check(AdapterBank.from_pretrained("me/bank", token=OWNER), *"abcd")
    assert {r.token for r in hub.requests if r.path.startswith("/cdn/")} == {None}


# ---- without a network


def offline(monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_offline(hub, bank, monkeypatch):
    AdapterBank.from_pretrained("me/bank", adapters=["a", "c"])
    hub.calm()
    with monkeypatch.context() as patch:
        offline(patch)
        check(AdapterBank.from_pretrained("me/bank", adapters=["c"]), "c")
        for adapters in (["a", "b"], None):
            with pytest.raises(HubError, match="'me/bank' is not in the cache, and HF_HUB_OFFLINE is set"):
                AdapterBank.from_pretrained("me/bank", adapters=adapters)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            AdapterBank.from_pretrained("me/other")
    assert not hub.requests
    AdapterBank.from_pretrained("me/bank")
    hub.calm()
    offline(monkeypatch)
    check(AdapterBank.from_pretrained("me/bank"), *"abcd")
    check(AdapterBank.from_pretrained("me/bank", adapters=["b"]), "b")
    assert not hub.requests


def test_a_hub_that_is_gone(hub, bank, monkeypatch):
    AdapterBank.from_pretrained("me/bank", adapters=["a"])
    hub.server.shutdown()
    hub.server.server_close()
    close_session()
    check(AdapterBank.from_pretrained("me/bank", adapters=["a"]), "a")
    with pytest.raises(HubError, match=r"connection to the Hub broke, for 'me/bank'"):
        AdapterBank.from_pretrained("me/bank", adapters=["b"])
    with pytest.raises(HubError, match=r"cannot be reached for 'me/other'.*HF_ENDPOINT"):
        AdapterBank.from_pretrained("me/other")


def read_only(monkeypatch, folder: Path) -> None:
    """Nothing below a folder can be written; a test's user may write everywhere."""

    def refused(path: object) -> bool:
        return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)

    def guarded(function, writes):
        def call(path, *args, **kwargs):
            if refused(path) and writes(path, *args, **kwargs):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return function(path, *args, **kwargs)

        return call

    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    monkeypatch.setattr(os, "open", guarded(os.open, lambda path, how, *_, **__: how & flags))
    monkeypatch.setattr(os, "mkdir", guarded(os.mkdir, lambda path, *_, **__: not os.path.exists(path)))
    monkeypatch.setattr(os, "replace", guarded(os.replace, lambda *_, **__: True))
    monkeypatch.setattr(os, "unlink", guarded(os.unlink, lambda *_, **__: True))
    writing = guarded(open, lambda path, mode="r", *_, **__: set(mode) & set("wax+"))
    monkeypatch.setattr("builtins.open", writing)
    monkeypatch.setattr("io.open", writing)


@pytest.mark.parametrize("whole", [True, False])
def test_a_cache_that_cannot_be_written(hub, bank, tmp_path, monkeypatch, whole):
    AdapterBank.from_pretrained("me/bank", adapters=None if whole else ["a"])
    with monkeypatch.context() as patch:
        read_only(patch, tmp_path / "home")
        check(AdapterBank.from_pretrained("me/bank", adapters=["a"]), "a")
        if whole:
            check(AdapterBank.from_pretrained("me/bank"), *"abcd")
        else:
            for adapters in (["a", "b"], None):
                with pytest.raises(HubError, match="HF_HOME"):
                    AdapterBank.from_pretrained("me/bank", adapters=adapters)
    with monkeypatch.context() as patch:
        read_only(patch, tmp_path / "empty")
        with hub.here(patch, tmp_path / "empty"), pytest.raises(HubError, match="HF_HOME"):
            AdapterBank.from_pretrained("me/bank")


def test_a_cache_that_was_damaged(hub, bank):
    found = AdapterBank.from_pretrained("me/bank", adapters=["a", "b"])
    next(found.path.glob("*.safetensors")).unlink()
    with pytest.raises(BankCorruptedError, match=r"bank 'me/bank': adapter 'a'.*Delete .* and open the bank again"):
        found.read("a")
    hub.calm()
    check(AdapterBank.from_pretrained("me/bank", adapters=["a", "b"]), "a", "b")
    assert hub.ranges() == ranges_of(hub, bank, "a", "b")
    (found.path / "bank.json").write_text("{}")
    with pytest.raises(HubError, match=rf"cannot be kept in the cache.*delete {found.path}"):
        AdapterBank.from_pretrained("me/bank", adapters=["a", "b"])


# ---- a pulled bank does not change; its copy does


@pytest.mark.parametrize("adapters", [None, ["a", "c"]], ids=["whole", "named"])
def test_a_pulled_bank_is_changed_in_a_copy(hub, bank, tmp_path, adapters):
    found = AdapterBank.from_pretrained("me/bank", adapters=adapters)
    before = {path: path.stat().st_mtime_ns for path in found.path.iterdir()}
    for change in (
        lambda: found.add_forms([("e", lora_form(5), "")]),
        lambda: found.remove("a"),
        lambda: found.merge("both", {"a": 0.5, "c": 0.5}),
        lambda: found.compact(),
    ):
        with pytest.raises(BankError, match=r"'me/bank' cannot be changed here: copy it with bank.copy\(folder\)"):
            change()
    assert {path: path.stat().st_mtime_ns for path in found.path.iterdir()} == before
    copy = found.copy(tmp_path / "copy")
    assert copy.info().dead_nbytes == 0
    check(AdapterBank.open(tmp_path / "copy"), *(adapters or "abcd"))
    copy.verify()
    copy.add_forms([("e", lora_form(5), "")])
    copy.remove("a")
    assert_same_form(copy.form("e"), lora_form(5))
    with pytest.raises(BankError, match="holds a bank already"):
        found.copy(tmp_path / "copy")
    with pytest.raises(BankError, match="not empty"):
        found.copy(tmp_path)


def test_copy_keeps_whole_shards_and_leaves_out_what_was_removed(tmp_path):
    bank = make_bank(tmp_path / "bank", **FORMS)
    bank.add_forms([("e", lora_form(5), "")])
    bank.remove("b")
    copy = bank.copy(tmp_path / "copy")
    check_names = ["a", "c", "d", "e"]
    assert copy.names == check_names and copy.info().dead_nbytes == 0
    copy.verify()
    assert (copy.path / bank["e"].shard).read_bytes() == (bank.path / bank["e"].shard).read_bytes()
    assert_same_form(copy.form("c"), FORMS["c"])
    (bank.path / bank["e"].shard).unlink()
    with pytest.raises(BankCorruptedError, match="bank-0002"):
        bank.copy(tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- processes

_PULL = """
import sys
from lorakit import AdapterBank
bank = AdapterBank.from_pretrained("me/bank", adapters=sys.argv[1:])
bank.verify()
print(*bank.names)
"""


def test_processes_pull_at_once(hub, bank, tmp_path):
    environment = {**os.environ, **hub.environment(tmp_path / "shared")}
    wanted = (["a", "b", "c"], ["b", "c", "d"])
    processes = [
        subprocess.Popen([sys.executable, "-c", _PULL, *names], env=environment, stdout=subprocess.PIPE, text=True)
        for names in wanted
    ]
    for process, names in zip(processes, wanted, strict=True):
        assert process.communicate(timeout=120)[0].split() == names and process.returncode == 0
    assert hub.ranges() == ranges_of(hub, bank, *"abcd"), "each adapter once"


def test_torch_sees_what_was_pulled(hub, bank):
    found = AdapterBank.from_pretrained("me/bank", adapters=["b"])
    entry = found["b"]
    extent = found.read_into("b", torch.empty(entry.nbytes, dtype=torch.uint8))
    assert torch.equal(extent.weights, bank.read("b").weights) and BASE["base_id"] == found.base_id
