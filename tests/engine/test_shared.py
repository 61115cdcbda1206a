"""Engines of two processes that share a base: the first decides, and both give what one process gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import shared, together
from served import PROMPT, Asked, config, double, family, requests, served
from torch import distributed

import lorakit
from lorakit import Engine, MultiLoraModel
from lorakit.engine.batching import SharedProcessor, blocks_in
from lorakit.engine.config import EngineConfig
from lorakit.errors import DeadlineExceededError, EngineCrashedError, LorakitError

pytest.importorskip("transformers.distributed.tensor_parallel")
if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

# One worker has all of them: what the processes give is computed once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

MIX = [None, "lora", "rslora", "dora", "embeddings", "alora"]
MANY = requests(24, MIX)
LONG = [Asked(one.prompt, one.adapter, 20) for one in requests(20, MIX, seed=1)]


def mixed(engine: Engine) -> Any:
    """Requests of any mix."""
    return served(engine, MANY)


def crowded(engine: Engine) -> Any:
    """Requests that do not fit the cache together: some must leave it, and begin again with what they have."""
    return served(engine, LONG)


def sampled(engine: Engine) -> Any:
    """Several sequences of a request, by seeds."""
    settings = {"temperature": 1.2, "top_p": 0.9, "n": 3, "max_new_tokens": 6, "logprobs": True}
    handles = [engine.submit(PROMPT, name, seed=seed, **settings) for seed, name in enumerate(MIX)]
    return [[one.token_ids for one in handle.results(60)] for handle in handles]


def ended(engine: Engine) -> Any:
    """Requests that end by what the first process alone knows: a caller, time, a text."""
    text = engine.submit(PROMPT, "lora", max_new_tokens=40, stop=[" "])
    late = engine.submit(PROMPT, "dora", max_new_tokens=40, deadline=1e-3)
    cancelled = engine.submit(PROMPT, "rslora", max_new_tokens=40)
    beside = engine.submit(PROMPT, "lora", max_new_tokens=10)
    next(iter(cancelled))
    cancelled.cancel()
    with pytest.raises(DeadlineExceededError):
        late.result(60)
    return text.result(60).token_ids, text.result(60).stop, beside.result(60).token_ids, served(engine, MANY[:8])


def pinned(engine: Engine) -> Any:
    """The first process pins an adapter and unloads others, which in part are used, while all take turns."""
    model = engine.model
    model.pin_adapter("dora")
    found = [served(engine, MANY[:8])]
    assert model.tiers()["dora"] == "device"
    running = engine.submit(PROMPT, "lora", max_new_tokens=20)
    next(iter(running))
    model.unload_adapter("lora")
    with pytest.raises(LorakitError, match="no adapter 'lora'"):
        engine.submit(PROMPT, "lora")
    found += [running.result(60).token_ids, served(engine, [one for one in MANY if one.adapter != "lora"])]
    model.load_adapter("lora")
    model.unpin_adapter("dora")
    model.pin_adapter("rslora")
    return [*found, served(engine, MANY[8:])]


def texts(tokens: list[int]) -> str:
    """A tokenizer's `decode`, of words."""
    return " ".join(map(str, tokens))


def block_of(model: MultiLoraModel) -> int:
    """About the bytes of a block of the cache."""
    nbytes = 256
    while blocks_in(nbytes, model.model, 4, 24) <= 1:
        nbytes *= 2
    return nbytes


def room_in(model: MultiLoraModel) -> int:
    """Adapter memory for the two largest."""
    return 256 * 2 + 2 * max(model.adapter(name).source.nbytes for name in model.adapters)


SCENES: dict[str, tuple[Callable[[Engine], Any], bool, Callable[[MultiLoraModel], EngineConfig]]] = {
    "mixed": (mixed, False, lambda _: config()),
    "few adapters fit": (mixed, True, lambda _: config(patience=0.0)),
    "a small cache": (crowded, False, lambda model: config(cache_memory=block_of(model) * 9)),
    "sampled": (sampled, False, lambda _: config()),
    "ended": (ended, True, lambda _: config()),
    "pinned": (pinned, True, lambda _: config(patience=0.05)),
}
"""What is asked, whether adapters have little room, and the engine's settings."""


def run(root: Path, base: Callable[[], Any], scene: str) -> dict[str, Any]:
    """A scene on a model of its own: what came of it, and what processes must have in common at its end."""
    ask, small, settings = SCENES[scene]
    model = MultiLoraModel(base(), root / "bank")
    if small:
        model = MultiLoraModel(model.model, root / "bank", adapter_memory=room_in(model))
    found: dict[str, Any] = {}
    thrown_out: list[str] = []
    with Engine(model, settings(model), decode=texts) as engine:
        processor = engine._batching.batch_processor
        wait = processor.scheduler.add_waiting_request

        def count(state: Any) -> None:
            if state._true_initial_tokens:
                thrown_out.append(state.request_id)
            wait(state)

        processor.scheduler.add_waiting_request = count
        if engine.leads:
            found["answers"] = ask(engine)
            assert engine.drain(30)
            time.sleep(0.3)  # a step without work, in which all that was held is let go
    slots = [(slot.key, slot.index, slot._offset, slot.pinned, slot.holds) for slot in model.pool._slots.values()]
    found["common"] = {
        "adapters, where they lie, and which goes first": slots,
        "loads": next(model.pool._puts),
        "thrown out": thrown_out,
        "steps": processor.model_runner.steps,
        "adapters in the steps": processor.model_runner.segments,
        "blocks": [len(one.ledger.cached_blocks) for one in processor.cache.cache_allocators.values()],
        "free": processor.cache.compute_free_capacity(),
    }
    return found


def shared_scenes(root: Path) -> dict[str, Any]:
    """In each process: all scenes, and what goes wrong."""
    base = partial(shared, root / "base")
    found: dict[str, Any] = {scene: run(root, base, scene) for scene in SCENES}
    found["refused"] = refused(MultiLoraModel(base(), root / "bank"))
    found["bank"] = changed(MultiLoraModel(base(), root / "bank"), root)
    found["crash"] = crashed(MultiLoraModel(base(), root / "bank"))
    return found


def refused(model: MultiLoraModel) -> list[str]:
    """What must not be asked of one of several processes."""
    found = []
    with Engine(model, config()) as engine:
        calls: list[Callable[[], Any]] = [
            lambda: model.load_adapter("other", family()[1]["lora"]),
        ]
        if not engine.leads:
            calls += [lambda: model.load_adapter("lora"), lambda: model.unload_adapter("lora")]
            calls += [lambda: model.pin_adapter("lora"), lambda: model.unpin_adapter("lora")]
            calls += [lambda: engine.submit(PROMPT), lambda: engine.generate([PROMPT], progress=False)]
        for call in calls:
            try:
                call()
            except LorakitError as error:
                found.append(type(error).__name__)
    return found


def changed(model: MultiLoraModel, root: Path) -> Any:
    """The bank gets an adapter, and another in the place of one, while the engine runs, by the first process."""
    with Engine(model, config()) as engine:
        if not engine.leads:
            return None
        found = [engine.submit(PROMPT, "lora", max_new_tokens=8).result(60).token_ids]
        model.bank.add("new", root / "peft" / "dora", base_model=root / "base")
        model.bank.add("lora", root / "peft" / "rslora", base_model=root / "base", overwrite=True)
        for name in ("new", "lora", "dora", "rslora"):
            found.append(engine.submit(PROMPT, name, max_new_tokens=8).result(60).token_ids)
        return found


def crashed(model: MultiLoraModel) -> Any:
    """The loop of the second process fails between two steps: the first must not wait for it forever."""
    engine = Engine(model, config())
    try:
        with engine:
            return crash_in(engine)
    except EngineCrashedError as error:
        return str(error), engine.state


def crash_in(engine: Engine) -> Any:
    if engine.leads:
        time.sleep(0.5)
        return engine.submit(PROMPT, "lora", max_new_tokens=8).result(60).token_ids
    processor = engine._batching.batch_processor
    assert isinstance(processor, SharedProcessor)

    def fail(orders: Any) -> Any:
        raise RuntimeError("a fault")

    processor.chooser.carry_out = fail  # type: ignore[method-assign]
    return None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    base, tenants = family()
    base.save_pretrained(root / "base")
    for name, tenant in tenants.items():
        tenant.save_pretrained(root / "peft" / name, save_embedding_layers=False)
    lorakit.export({name: root / "peft" / name for name in tenants}, root / "bank", base_model=base)
    return root


@pytest.fixture(scope="module")
def expected(root):
    return {scene: run(root, double, scene) for scene in SCENES}


@pytest.fixture(scope="module")
def several(root, expected):
    return together(shared_scenes, root)


@pytest.mark.parametrize("scene", SCENES)
def test_two_processes_give_what_one_gives(expected, several, scene):
    assert several[0][scene]["answers"] == expected[scene]["answers"]


@pytest.mark.parametrize("scene", SCENES)
def test_processes_stay_in_step(several, scene):
    first, second = (found[scene]["common"] for found in several)
    assert first == second
    assert first["steps"] > 10
    if scene == "few adapters fit":
        assert first["loads"] > len(first["adapters, where they lie, and which goes first"]), "none had to go"
    if scene == "a small cache":
        assert first["thrown out"]
    assert not any(holds for *_, holds in first["adapters, where they lie, and which goes first"])


def test_one_of_several_processes_refuses_what_it_cannot_do_alone(several):
    assert several[0]["refused"] == ["ModelInUseError"]
    assert several[1]["refused"] == ["ModelInUseError"] * 5 + ["EngineError"] * 2


def test_a_changed_bank_reaches_all_processes(several):
    before, new, replaced, dora, rslora = several[0]["bank"]
    assert (new, replaced) == (dora, rslora)
    assert len({before, dora, rslora}) == 3


def test_a_process_that_fails_takes_the_engine_down_and_nobody_waits_forever(several):
    (first, state), (second, _) = several[0]["crash"], several[1]["crash"]
    assert "another of the processes" in first and state == "closed"
    assert "a fault" in second
