"""Writers killed at every step, and writers at the same time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forms import BASE, assert_same_form, lora_form, make_bank

from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.form import AdapterForm
from lorakit.errors import AdapterExistsError, BankCorruptedError, BankError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLED = 17
STEPS = ("open", "pwrite", "fsync", "replace", "unlink")


def tiny(seed: int, rank: int = 1) -> AdapterForm:
    return lora_form(seed, layers=1, targets=("q", "v"), hidden=3, rank=rank)


def killed_at(step: int, action: Callable[[], object]) -> bool:
    """Runs an action in a process that dies just before its n-th step. Returns whether it died."""
    process = os.fork()
    if process == 0:
        try:
            count = itertools.count(1)

            def instrument(name: str) -> None:
                original = getattr(os, name)

                def stepped(*arguments: Any, **options: Any) -> Any:
                    if next(count) == step:
                        if name == "pwrite":  # A write that was under way.
                            original(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                        os._exit(KILLED)
                    return original(*arguments, **options)

                setattr(os, name, stepped)

            for name in STEPS:
                instrument(name)
            action()
            os._exit(0)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, KILLED), "the action failed instead of being killed"
    return code == KILLED


ACTIONS: dict[str, tuple[Callable[[AdapterBank], object], dict[str, int]]] = {
    "add": (
        # Two shards.
        lambda bank: bank.add_forms([("x", tiny(7), ""), ("y", tiny(8, rank=3), "")], shard_bytes=100),
        {"a": 0, "b": 1, "c": 2, "x": 7, "y": 8},
    ),
    "overwrite": (
        lambda bank: bank.add_forms([("c", tiny(7), "")], overwrite=True),
        {"a": 0, "b": 1, "c": 7},
    ),
    "write over": (
        lambda bank: AdapterBank.write(bank.path, [("a", tiny(7), ""), ("d", tiny(8), "")], **BASE, overwrite=True),
        {"a": 7, "d": 8},
    ),
    "remove": (lambda bank: bank.remove("a", "c"), {"b": 1}),
    "compact": (lambda bank: bank.compact(), {"a": 0, "b": 1, "c": 2}),
}


def content(path: Path) -> dict[str, AdapterForm]:
    bank = AdapterBank.open(path)
    bank.verify()
    return {name: bank.form(name) for name in bank.names}


def equals(left: dict[str, AdapterForm], right: dict[str, AdapterForm]) -> bool:
    if left.keys() != right.keys():
        return False
    try:
        for name, form in left.items():
            assert_same_form(form, right[name])
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("action", ACTIONS)
def test_killed_at_every_step(tmp_path: Path, action: str) -> None:
    pristine = tmp_path / "pristine"
    bank = make_bank(pristine, a=tiny(0), b=tiny(1), gone=tiny(5))
    bank.add_forms([("c", tiny(2), "")])
    bank.remove("gone")
    old = content(pristine)
    assert equals(old, {"a": tiny(0), "b": tiny(1), "c": tiny(2)})
    change, seeds = ACTIONS[action]
    new = {name: tiny(seed, rank=3 if name == "y" else 1) for name, seed in seeds.items()}
    committed = False
    for step in itertools.count(1):
        path = tmp_path / "bank"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(pristine, path)
        killed = killed_at(step, lambda path=path: change(AdapterBank.open(path)))
        found = content(path)
        if committed or not killed:
            assert equals(found, new)
        else:
            assert equals(found, old) or equals(found, new)
            committed = action != "compact" and equals(found, new)
        # The next writer is not held up, and sweeps.
        again = AdapterBank.open(path)
        again.add_forms([("next", tiny(9), "")])
        again.verify()
        kept = {entry.shard for entry in again.values()} | {"bank.json"}
        assert {file.name for file in path.iterdir()} - {".lock"} == kept
        if not killed:
            assert step > 8
            break


def test_create_killed_at_every_step(tmp_path: Path) -> None:
    for step in itertools.count(1):
        path = tmp_path / str(step)
        killed = killed_at(step, lambda path=path: AdapterBank.create(path, **BASE))
        bank = AdapterBank.open(path) if (path / "bank.json").exists() else AdapterBank.create(path, **BASE)
        bank.add_forms([("x", tiny(0), "")])
        bank.verify()
        if not killed:
            assert step > 3
            break


def test_write_killed_at_every_step(tmp_path: Path) -> None:
    def write(path: Path) -> AdapterBank:
        return AdapterBank.write(path, [("x", tiny(0), ""), ("y", tiny(1), "")], **BASE)

    for step in itertools.count(1):
        path = tmp_path / str(step)
        killed = killed_at(step, lambda path=path: write(path))
        if (path / "bank.json").exists():
            assert equals(content(path), {"x": tiny(0), "y": tiny(1)})
        elif any(path.glob("*.safetensors")):
            # Whole shards without an index may be what is left of somebody's bank: they are not touched.
            with pytest.raises(BankError, match="not empty"):
                write(path)
        else:
            assert equals(content(write(path).path), {"x": tiny(0), "y": tiny(1)})
        if not killed:
            assert step > 8
            break


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> AdapterForm:
        raise RuntimeError("inside")

    items = [("x", tiny(0), ""), ("y", fail, "")]
    with pytest.raises(RuntimeError, match="inside"):
        AdapterBank.write(tmp_path / "new", items, **BASE)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match="inside"):
        AdapterBank.write(tmp_path / "empty", items, **BASE)
    assert {path.name for path in (tmp_path / "empty").iterdir()} <= {".lock"}
    old = make_bank(tmp_path / "old", a=tiny(1))
    with pytest.raises(RuntimeError, match="inside"):
        AdapterBank.write(tmp_path / "old", items, **BASE, overwrite=True)
    assert equals(content(tmp_path / "old"), {"a": tiny(1)})
    assert {path.name for path in old.path.iterdir()} - {".lock"} == {"bank.json", old["a"].shard}


def test_a_reader_of_a_bank_that_was_written_over_never_reads_anothers_weights(tmp_path: Path) -> None:
    old = make_bank(tmp_path / "bank", a=tiny(0), b=tiny(1))
    AdapterBank.write(tmp_path / "bank", [("b", tiny(7), ""), ("a", tiny(8), "")], **BASE, overwrite=True)
    for name in ("a", "b"):
        with pytest.raises(BankCorruptedError, match="open it again"):
            old.read(name)
    old.reload()
    assert_same_form(old.form("a"), tiny(8))


def test_steps_come_in_an_order_that_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank"
    bank = make_bank(path, a=tiny(0))
    steps: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real = {name: getattr(os, name) for name in STEPS}

    def fake_open(file: Any, *arguments: Any, **options: Any) -> int:
        handle = real["open"](file, *arguments, **options)
        opened[handle] = Path(file).name
        return handle

    def fake_pwrite(handle: int, *arguments: Any) -> int:
        steps.append(("write", opened[handle]))
        return real["pwrite"](handle, *arguments)

    def fake_fsync(handle: int) -> None:
        steps.append(("sync", opened[handle]))
        real["fsync"](handle)

    def fake_replace(source: Any, target: Any) -> None:
        steps.append(("name", Path(target).name))
        real["replace"](source, target)

    def fake_unlink(file: Any, **options: Any) -> None:
        steps.append(("delete", Path(file).name))
        real["unlink"](file, **options)

    fakes = (fake_open, fake_pwrite, fake_fsync, fake_replace, fake_unlink)
    for name, fake in zip(STEPS, fakes, strict=True):
        monkeypatch.setattr(os, name, fake)
    bank.add_forms([("a", tiny(1), "")], overwrite=True)
    monkeypatch.undo()
    steps = [step for step, _ in itertools.groupby(steps) if step != ("delete", ".lock")]
    assert steps == [
        ("write", "bank-0002.safetensors.tmp"),
        ("sync", "bank-0002.safetensors.tmp"),
        ("name", "bank-0002.safetensors"),
        ("sync", "bank"),
        ("write", "bank.json.tmp"),
        ("sync", "bank.json.tmp"),
        ("name", "bank.json"),
        ("sync", "bank"),
        ("delete", "bank-0001.safetensors"),
    ]


def _add_many(path: Path, prefix: str, barrier: Any) -> None:
    bank = AdapterBank.open(path)
    barrier.wait()
    for index in range(6):
        bank.add_forms([(f"{prefix}-{index}", tiny(index), prefix)])


def _add_same(path: Path, barrier: Any, results: Any) -> None:
    bank = AdapterBank.open(path)
    barrier.wait()
    try:
        bank.add_forms([("x", tiny(0), str(os.getpid()))])
        results.put(os.getpid())
    except AdapterExistsError:
        results.put(None)


def run_two(target: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_two_writers_both_win(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    make_bank(path, first=tiny(0))
    barrier = multiprocessing.get_context("fork").Barrier(2)
    run_two(_add_many, (path, "left", barrier), (path, "right", barrier))
    bank = AdapterBank.open(path)
    bank.verify()
    assert set(bank.names) == {"first", *(f"{side}-{index}" for side in ("left", "right") for index in range(6))}
    assert len(list(path.glob("*.safetensors"))) == 13


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    make_bank(path, first=tiny(0))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    run_two(_add_same, (path, barrier, results), (path, barrier, results))
    winners = [winner for winner in (results.get(timeout=5), results.get(timeout=5)) if winner]
    assert [AdapterBank.open(path)["x"].source] == [str(winner) for winner in winners]


def test_readers_need_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    bank = make_bank(path, a=tiny(0))
    with bank._folder.locked():
        other = AdapterBank.open(path)
        other.verify()
        assert_same_form(other.form("a"), tiny(0))
