"""Standing batches: made once, and any mix of tokens' slots goes through them as through a batch of its own."""

import copy
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, METHODS, adapt

from lorakit import MultiLoraModel
from lorakit.runtime import ops

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}
SIZES = {"tokens": 16, "segments": 4}


@cache
def tenants():
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    options = {
        "small": TARGETS,
        "large": TARGETS | {"r": 20},
        "dora": {"target_modules": ["q_proj", "k_proj"], "use_dora": True},
        "embeddings": METHODS["embeddings"](architecture),
        "saved": METHODS["saved"](architecture),
    }
    return base, {name: adapt(base, seed, **one) for seed, (name, one) in enumerate(options.items())}


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda *_: True)
    base, adapted = tenants()
    model = MultiLoraModel(copy.deepcopy(base).to("cuda" if torch.cuda.is_available() else "cpu"))
    for name, tenant in adapted.items():
        model.load_adapter(name, tenant)
    return model


def slots_of(model, names):
    return [None if name is None else model._slot(name, keep=[other for other in names if other]) for name in names]


@torch.no_grad()
def by_itself(model, ids, slots, kept):
    with model.serving(slots, kept):
        return logits(model, ids, kept)


@torch.no_grad()
def standing(model, ids, slots, kept):
    found = model.standing(slots, **SIZES)
    found.set(slots, kept)
    with model.standing_by(found):
        return logits(model, ids, kept)


def logits(model, ids, kept):
    keep = 0 if kept is None else torch.tensor(kept, device=ids.device)
    return model.model(input_ids=ids, logits_to_keep=keep).logits


def ids_of(model, count):
    return torch.arange(3, 3 + count, device=model.device).unsqueeze(0)


def test_any_mix_gives_what_a_batch_of_its_own_gives(model):
    made = set()
    # The first forward serves siblings alone, the others together.
    for names, kept in ((["small", None, "dora"], None), (["dora", None, "dora"], [2, 0]), ([None, "small"], [0])):
        slots, ids = slots_of(model, names), ids_of(model, len(names))
        assert torch.equal(standing(model, ids, slots, kept), by_itself(model, ids, slots, kept))
        made.add(id(model.standing(slots, **SIZES)))
    assert len(made) == 1


def test_embeddings_and_the_output_layer_stand(model):
    slots, ids = slots_of(model, ["embeddings", None]), ids_of(model, 2)
    assert torch.equal(standing(model, ids, slots, [1, 0]), by_itself(model, ids, slots, [1, 0]))


def test_a_larger_rank_has_a_batch_of_its_own(model):
    small, large = (model.standing(slots_of(model, [name]), **SIZES) for name in ("small", "large"))
    assert (small.mode.max_rank, large.mode.max_rank) == (16, 32)
    assert model.standing(slots_of(model, ["small", "large"]), **SIZES) is large
    assert {one.mode.max_rank for one in model.standings(**SIZES)} == {16, 32}


def test_whole_weights_do_not_stand(model):
    assert model.standing(slots_of(model, ["saved", "small"]), **SIZES) is None
    assert model.standing([None, None], **SIZES) is None


def test_an_adapter_that_touches_more_makes_them_anew(model):
    model.unload_adapter("dora")
    slots = slots_of(model, ["small"])
    before, version = model.standing(slots, **SIZES), model.standing_version
    assert model.standing(slots, **SIZES) is before
    model.load_adapter("more", tenants()[1]["dora"])
    both = [*slots, *slots_of(model, ["more"])]
    ids = ids_of(model, 2)
    assert torch.equal(standing(model, ids, both, None), by_itself(model, ids, both, None))
    assert model.standing(slots, **SIZES) is not before and model.standing_version != version


def test_an_adapter_of_another_layout_leaves_them_as_they_are(model):
    """Graphs that were captured go on: they know the tensors of a standing batch by their addresses."""
    slots, ids = slots_of(model, ["small"]), ids_of(model, 2)
    standing(model, ids, [*slots, None], None)  # shows who are siblings
    before, version = model.standing(slots, **SIZES), model.standing_version
    model.load_adapter("other", adapt(tenants()[0], 9, **TARGETS, r=3, lora_alpha=7))
    both = [*slots, *slots_of(model, ["other"])]
    assert torch.equal(standing(model, ids, both, None), by_itself(model, ids, both, None))
    assert model.standing(both, **SIZES) is before
    assert model.standing_version == version


@torch.no_grad()
def test_before_any_adapter_is_resident_it_serves_the_base(model):
    """So that graphs can be captured ahead, and stay right when adapters come."""
    ids = ids_of(model, 2)
    version = None
    for found in model.standings(**SIZES):
        found.set([None, None], None)
        with model.standing_by(found):
            assert torch.equal(logits(model, ids, None), model.model(input_ids=ids).logits)
        version = model.standing_version
    assert version is not None
    for names in (["small", None], ["dora", "large"], ["embeddings", "small"]):
        slots = slots_of(model, names)
        assert torch.equal(standing(model, ids, slots, None), by_itself(model, ids, slots, None))
    assert model.standing_version == version


@torch.no_grad()
def test_compiled_once_it_serves_every_mix_of_any_size_without_a_graph_break(model):
    mixes = [["small", None, "dora"], ["dora", "dora", None], [None, "small"], ["small"] * 3 + ["dora"] * 4]
    expected = []
    for names in mixes:
        slots, ids = slots_of(model, names), ids_of(model, len(names))
        standing(model, ids, slots, None)  # shows who are siblings
        expected.append(standing(model, ids, slots, None))
    model.model.forward = torch.compile(model.model.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    found = [standing(model, ids_of(model, len(mixes[0])), slots_of(model, mixes[0]), None)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [standing(model, ids_of(model, len(names)), slots_of(model, names), None) for names in mixes[1:]]
    torch.testing.assert_close(found, expected)
