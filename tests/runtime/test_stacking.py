"""Batches on the CPU whose factors were stacked for another batch, as an engine's are."""

import copy
import random
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, METHODS, VOCAB, adapt

from lorakit import MultiLoraModel
from lorakit.runtime import factors
from lorakit.runtime.stacking import _runs

# Two of each rank, so that some are stacked together and some are not; c and d; an embedding's factors; a whole head.
TENANTS = ("lora", "lora", "dora", "rslora", "dora", "embeddings", "lora", "saved")


@cache
def tenants():
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    return base, [adapt(base, seed, **METHODS[method](architecture)) for seed, method in enumerate(TENANTS)]


@pytest.fixture
def model():
    base, adapted = tenants()
    model = MultiLoraModel(copy.deepcopy(base))
    for number, tenant in enumerate(adapted):
        model.load_adapter(f"{number}", tenant)
    with model.lent():
        yield model


@pytest.fixture
def stacked(monkeypatch):
    """The slots of every time that some were stacked at a module."""
    calls = []
    make = factors._stacked

    def counted(module, slots, dtype):
        calls.append((module.path, [slot.key for slot in slots]))
        return make(module, slots, dtype)

    monkeypatch.setattr(factors, "_stacked", counted)
    return calls


def slots_of(model, names):
    return [None if name is None else model._slot(name, keep=()) for name in names]


@torch.no_grad()
def logits_of(model, names, kept=None, seed=0):
    ids = torch.randint(VOCAB, (1, len(names)), generator=torch.Generator().manual_seed(seed))
    with model.serving(slots_of(model, names), kept):
        found = model.model(input_ids=ids, logits_to_keep=0 if kept is None else torch.tensor(kept)).logits
    return found


def mixes(rng, names, count):
    """Steps of an engine: prompts of any length and single tokens, in any order; some slots come, some go."""
    for _ in range(count):
        some = rng.sample(names, rng.randint(1, len(names)))
        tokens = [(name, 1 if rng.random() < 0.6 else rng.randint(2, 9)) for name in some]
        yield [name for name, many in tokens for _ in range(many)]


def test_whatever_was_stacked_before_the_outputs_are_the_same(model, stacked):
    names = [*(f"{number}" for number in range(len(TENANTS))), None]
    rng = random.Random(0)
    steps = list(mixes(rng, names, 40))
    kept = [[place for place in range(len(step)) if rng.random() < 0.5] or None for step in steps]
    found = [logits_of(model, step, some) for step, some in zip(steps, kept, strict=True)]
    often = len(stacked)
    stacked.clear()
    for step, some, logits in zip(steps, kept, found, strict=True):
        model._adapted.last = None
        torch.testing.assert_close(logits, logits_of(model, step, some), rtol=1e-5, atol=1e-5)
    assert often < len(stacked)


def test_adapters_that_stay_are_not_stacked_again(model, stacked):
    names = ["0", "1", "6"]
    logits_of(model, ["0"] * 7 + ["1"] * 3 + ["6"] * 5)
    assert {tuple(slots) for _, slots in stacked} and len(stacked) == len({path for path, _ in stacked})
    stacked.clear()
    for step in (names, names[::-1], ["1", "0"], ["6", "6", "0", "1"], ["1", None, "6"], [*names, *["0"] * 9]):
        logits_of(model, step)
    assert not stacked
    logits_of(model, ["1"])  # two in vain for one of use are too many
    assert {len(slots) for _, slots in stacked} == {1}
    logits_of(model, ["0", "1"])
    assert {len(slots) for _, slots in stacked} == {1, 2}


def test_a_step_of_the_same_adapters_is_formed_once(model, monkeypatch):
    formed = []
    adapt = model._adapted.adapt
    monkeypatch.setattr(model._adapted, "adapt", lambda rows: formed.append(rows) or adapt(rows))
    first = logits_of(model, ["0", "1", None], kept=[1, 2])
    formed.clear()
    assert torch.equal(logits_of(model, ["0", "1", None], kept=[1, 2]), first)
    assert not formed
    other = logits_of(model, ["0", "1", None], kept=[0, 2])
    assert formed and torch.equal(other[:, 1], first[:, 1]) and not torch.equal(other[:, 0], first[:, 0])


def test_an_adapter_that_is_stacked_but_not_asked_for_reaches_no_row(model):
    for module in slots_of(model, ["1"])[0].modules.values():
        for _, tensor in module.tensors():
            tensor.fill_(float("nan"))
    mix, without = ["0", "1", "6"], [None, "0", "6", "6"]
    assert logits_of(model, mix)[0, 1:].isnan().all()
    found = logits_of(model, without)
    assert found.isfinite().all()
    model._adapted.last = None
    torch.testing.assert_close(found, logits_of(model, without), rtol=1e-5, atol=1e-5)


def test_what_is_unloaded_or_not_used_any_more_is_let_go(model):
    logits_of(model, ["0", "1", "2", "5"])
    held = model._adapted.last.factors._made
    assert any(len(one.places) > 1 for one in held.values())
    logits_of(model, ["2"])
    assert {len(one.places) for one in model._adapted.last.factors._made.values()} == {1}
    assert not model._adapted.last.factors._before
    model.unload_adapter("2")
    assert model._adapted.last is None


def test_outside_an_engine_the_same_call_gives_the_same_bits(stacked):
    base, adapted = tenants()
    model = MultiLoraModel(copy.deepcopy(base))
    for number, tenant in enumerate(adapted):
        model.load_adapter(f"{number}", tenant)
    ids = torch.randint(VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(ids, adapter_ids=["0", "1", "6"]).logits
        model(ids, adapter_ids=["6", "1", "0"])
        count = len(stacked)
        assert torch.equal(model(ids, adapter_ids=["0", "1", "6"]).logits, first)
    assert len(stacked) > count  # stacked anew


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_all_places_and_few_others(seed):
    rng = random.Random(seed)
    places = sorted(rng.sample(range(60), rng.randint(1, 40)))
    runs = list(_runs(places))
    covered = [place for first, after in runs for place in range(first, after)]
    assert covered == sorted(set(covered)) and set(places) <= set(covered)
    for first, after in runs:
        assert first in places and after - 1 in places
        assert after - first <= 2 * sum(first <= place < after for place in places)
