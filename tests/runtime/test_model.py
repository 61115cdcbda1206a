"""MultiLoraModel's manners: generation's options, adapters that come and go, errors, threads."""

import copy
import threading

import pytest
import torch
from architectures import ARCHITECTURES, adapt

import lorakit
from lorakit import MultiLoraModel
from lorakit.errors import (
    AdapterExistsError,
    AdapterIdsError,
    AdapterNameError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    LorakitError,
    PoolFullError,
)

LLAMA = ARCHITECTURES["llama"]
TENANTS = {"a": {"r": 4}, "b": {"r": 16, "use_rslora": True}, "c": {"r": 1, "use_dora": True}}


@pytest.fixture(scope="module")
def base():
    return LLAMA.build()


@pytest.fixture(scope="module")
def tenants(base):
    return {
        name: adapt(base, seed, **({"target_modules": "all-linear"} | options))
        for seed, (name, options) in enumerate(TENANTS.items())
    }


@pytest.fixture
def model(base, tenants):
    model = MultiLoraModel(copy.deepcopy(base))
    for name, tenant in tenants.items():
        model.load_adapter(name, tenant)
    return model


@pytest.fixture(scope="module")
def folders(tenants, tmp_path_factory):
    root = tmp_path_factory.mktemp("peft")
    for name, tenant in tenants.items():
        tenant.save_pretrained(root / name)
    return {name: root / name for name in tenants}


@pytest.fixture
def bank(base, folders, tmp_path):
    return lorakit.export(folders, tmp_path / "bank", base_model=base)


IDS = ["b", None, "a", "c", "a"]


def prompts(rows: int) -> torch.Tensor:
    return LLAMA.inputs(rows)["input_ids"]


def expected(base, tenants, ids, input_ids, **options):
    return [
        (tenants[name] if name else base).generate(input_ids=input_ids[row : row + 1], **options)
        for row, name in enumerate(ids)
    ]


# Generation


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_deterministic_decoding_equals_pefts(base, tenants, model, options):
    options = {"max_new_tokens": 5, "do_sample": False} | options
    ids = prompts(len(IDS))
    rows = model.generate(ids, adapter_ids=IDS, **options).split(options.get("num_return_sequences", 1))
    for mine, theirs in zip(rows, expected(base, tenants, IDS, ids, **options), strict=True):
        assert torch.equal(mine, theirs)


def test_sampling_with_a_seed_repeats_and_equals_pefts(tenants, model):
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.3, "num_return_sequences": 3}
    ids = prompts(4)

    def sample(generator):
        torch.manual_seed(7)
        return generator.generate(input_ids=ids, **options)

    class Tenant:
        def generate(self, **kwargs):
            return model.generate(adapter_ids="b", **kwargs)

    assert torch.equal(sample(Tenant()), sample(Tenant()))
    assert torch.equal(sample(Tenant()), sample(tenants["b"]))


def test_left_padding_equals_each_prompt_alone(base, tenants, model):
    lengths = [3, 7, 5, 6, 2]
    whole = prompts(len(IDS))
    ids, mask = torch.zeros_like(whole), torch.zeros_like(whole)
    for row, length in enumerate(lengths):
        ids[row, -length:] = whole[row, :length]
        mask[row, -length:] = 1
    options = {"max_new_tokens": 5, "do_sample": False}
    mine = model.generate(input_ids=ids, attention_mask=mask, adapter_ids=IDS, **options)
    for row, (name, length) in enumerate(zip(IDS, lengths, strict=True)):
        alone = (tenants[name] if name else base).generate(input_ids=whole[row : row + 1, :length], **options)
        assert torch.equal(mine[row, 7:], alone[0, length:])


@torch.no_grad()
def test_a_cached_step_by_step_forward_equals_one_pass(model):
    ids = prompts(len(IDS))
    whole = model(input_ids=ids, adapter_ids=IDS).logits
    head = model(input_ids=ids[:, :4], adapter_ids=IDS, use_cache=True)
    tail = model(input_ids=ids[:, 4:], past_key_values=head.past_key_values, adapter_ids=IDS)
    torch.testing.assert_close(tail.logits, whole[:, 4:])


@torch.no_grad()
def test_compiled_equals_eager_without_graph_breaks(model):
    ids = prompts(len(IDS))
    eager = [model(input_ids=ids, adapter_ids=order).logits for order in (IDS, IDS[::-1])]
    model.compile(backend="aot_eager", fullgraph=True)
    for order, logits in zip((IDS, IDS[::-1]), eager, strict=True):
        torch.testing.assert_close(model(input_ids=ids, adapter_ids=order).logits, logits)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, adapter_ids=IDS).logits, eager[0])


@pytest.mark.long
@pytest.mark.slow
@torch.no_grad()
def test_an_inductor_compiled_base_equals_eager(model):
    ids = prompts(len(IDS))
    eager = model(input_ids=ids, adapter_ids=IDS).logits
    model.compile()
    torch.testing.assert_close(model(input_ids=ids, adapter_ids=IDS).logits, eager, rtol=1e-4, atol=1e-4)


def test_other_ways_to_give_rows(base, tenants, model):
    options = {"max_new_tokens": 3, "do_sample": False}
    ids = prompts(2)
    embeds = base.get_input_embeddings()(ids)
    theirs = tenants["a"].generate(inputs_embeds=embeds, **options)
    assert torch.equal(model.generate(inputs_embeds=embeds, adapter_ids=["a", "a"], **options), theirs)
    assert torch.equal(model.generate(inputs=ids, adapter_ids="a", **options)[:, 7:], theirs)
    model.generate(bos_token_id=1, adapter_ids=["a"], **options)  # no input at all is one row


# Adapters come and go


@torch.no_grad()
def test_a_bank_is_served_on_demand(base, bank, tenants):
    model = MultiLoraModel(copy.deepcopy(base), bank)
    assert model.adapters == ["a", "b", "c"] and model._pool.keys == []
    ids = prompts(2)
    torch.testing.assert_close(
        model(input_ids=ids, adapter_ids="b").logits, tenants["b"](input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )
    assert len(model._pool.keys) == 1


@torch.no_grad()
def test_adapters_can_be_added_and_removed_while_the_model_lives(base, folders, model):
    ids = prompts(3)
    before = model(input_ids=ids, adapter_ids=["a", "b", None]).logits
    late = adapt(base, 9, target_modules=["o_proj", "lm_head"])
    model.load_adapter("late", late)
    mixed = model(input_ids=ids, adapter_ids=["late", "b", None]).logits
    torch.testing.assert_close(mixed[:1], late(input_ids=ids[:1]).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1:], before[1:])
    model.unload_adapter("a")
    assert model.adapters == ["b", "c", "late"]
    with pytest.raises(AdapterNotFoundError, match="'a'"):
        model(input_ids=ids, adapter_ids=["a", "b", None])
    model.load_adapter("a", folders["a"])
    torch.testing.assert_close(model(input_ids=ids, adapter_ids=["a", "b", None]).logits, before)


def test_unloading_frees_the_slot(model):
    model.generate(prompts(2), adapter_ids=["a", "b"], max_new_tokens=1)
    held = model._pool.nbytes
    model.unload_adapter("a")
    assert 0 < model._pool.nbytes < held


@torch.no_grad()
def test_an_adapter_replaced_under_its_name_is_never_served_stale(base, bank, tmp_path):
    model = MultiLoraModel(copy.deepcopy(base), bank)
    ids = prompts(1)
    old = model(input_ids=ids, adapter_ids="a").logits
    other = adapt(base, 5, target_modules="all-linear")
    other.save_pretrained(tmp_path / "other")
    bank.add("a", tmp_path / "other", base_model=base, overwrite=True)
    new = model(input_ids=ids, adapter_ids="a").logits
    torch.testing.assert_close(new, other(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(old, new)
    assert model._pool.keys == [bank["a"].blake3]  # and the old one's memory is free


def test_a_banks_adapter_can_be_unloaded_and_loaded_again(base, bank):
    model = MultiLoraModel(copy.deepcopy(base), bank)
    model.unload_adapter("b")
    assert model.adapters == ["a", "c"] and bank.names == ["a", "b", "c"]
    model.load_adapter("b")
    assert model.adapters == ["a", "b", "c"]
    with pytest.raises(AdapterNotFoundError, match="'d'"):
        model.load_adapter("d")


@torch.no_grad()
def test_a_full_pool_evicts_what_was_used_longest_ago(base, bank):
    room = bank["a"].nbytes + bank["b"].nbytes + bank["c"].nbytes - 1
    model = MultiLoraModel(copy.deepcopy(base), bank, adapter_memory=room)
    unlimited = MultiLoraModel(copy.deepcopy(base), bank)
    ids = prompts(2)
    for names in (["a", "b"], ["a", "c"], ["b", "c"], ["c", "a"]):
        expected = unlimited(input_ids=ids, adapter_ids=names).logits
        assert torch.equal(model(input_ids=ids, adapter_ids=names).logits, expected)
        assert model._pool.nbytes <= room
    assert model._pool.keys == [bank[name].blake3 for name in ("c", "a")]
    with pytest.raises(PoolFullError, match="adapter_memory"):
        model(input_ids=prompts(3), adapter_ids=["a", "b", "c"])
    model(input_ids=ids, adapter_ids=["a", "c"])


# Errors


@pytest.mark.parametrize(
    ("adapter_ids", "error", "words"),
    [
        (["a"], AdapterIdsError, "1 entries for a batch of 2 rows"),
        (["a", "b", "c"], AdapterIdsError, "3 entries"),
        ([], AdapterIdsError, "0 entries"),
        (["a", "zebra"], AdapterNotFoundError, "'zebra'"),
        (["a", 3], AdapterIdsError, "holds 3"),
        ("zebra", AdapterNotFoundError, "'zebra'"),
    ],
)
def test_wrong_adapter_ids_are_refused_before_anything_is_computed(model, adapter_ids, error, words):
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    for call in (model, model.generate):
        with pytest.raises(error, match=words):
            call(input_ids=prompts(2), adapter_ids=adapter_ids)
    assert not calls


def test_a_taken_or_impossible_name_is_refused(model, folders):
    with pytest.raises(AdapterExistsError, match="'a'"):
        model.load_adapter("a", folders["b"])
    with pytest.raises(AdapterNameError):
        model.load_adapter("../x", folders["b"])


def test_a_refused_adapter_disturbs_nothing(model, tmp_path):
    before = model.generate(prompts(2), adapter_ids=["a", "b"], max_new_tokens=3, do_sample=False)
    with pytest.raises(LorakitError):
        model.load_adapter("new", tmp_path)
    assert model.adapters == ["a", "b", "c"]
    after = model.generate(prompts(2), adapter_ids=["a", "b"], max_new_tokens=3, do_sample=False)
    assert torch.equal(before, after)


def test_a_bank_of_another_base_is_refused(bank):
    other = LLAMA.build()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    with pytest.raises(BaseModelMismatchError, match="up_proj"):
        MultiLoraModel(other, bank)
    with pytest.raises(BaseModelMismatchError, match="MistralForCausalLM"):
        MultiLoraModel(ARCHITECTURES["mistral"].build(), bank)


def test_a_model_that_peft_has_wrapped_is_refused(tenants):
    for wrapped in (tenants["a"], tenants["a"].get_base_model()):
        with pytest.raises(BaseModelMismatchError, match="PEFT's layers inside"):
            MultiLoraModel(wrapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_accepted(bank, dtype):
    MultiLoraModel(LLAMA.build(dtype), bank)


@torch.no_grad()
def test_an_exception_inside_leaves_no_state_behind(base, model):
    ids = prompts(2)

    def fail(*_):
        raise RuntimeError("inside")

    handle = model.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        model(input_ids=ids, adapter_ids=["a", "b"])
    handle.remove()
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert torch.equal(model.model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_the_base_keeps_its_state_dict(base, model):
    assert model.model.state_dict().keys() == base.state_dict().keys()


# Threads


def test_two_models_in_two_threads_do_not_disturb_each_other(base, tenants):
    models = {}
    for name in ("a", "b"):
        models[name] = MultiLoraModel(copy.deepcopy(base))
        models[name].load_adapter("mine", tenants[name])
    _race({name: (model, ["mine", None]) for name, model in models.items()})


def test_two_threads_on_one_model_take_turns(model):
    _race({"a": (model, ["a", None]), "b": (model, ["b", "c"])})


def _race(work):
    """Runs each call alone, then all at once many times, and compares."""
    ids = prompts(2)
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = {key: model.generate(ids, adapter_ids=names, **options) for key, (model, names) in work.items()}
    wrong = []

    def repeat(key):
        model, names = work[key]
        for _ in range(5):
            if not torch.equal(model.generate(ids, adapter_ids=names, **options), alone[key]):
                wrong.append(key)

    threads = [threading.Thread(target=repeat, args=(key,)) for key in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_adapter_loads_to_where_the_model_has_gone(model, monkeypatch):
    elsewhere = torch.device("meta")
    monkeypatch.setattr(MultiLoraModel, "device", property(lambda self: elsewhere))
    model.load_adapter("a")
    assert model._pool.device == elsewhere
