"""Adapters that act from their invocation tokens on (aLoRA), beside others in one batch, against PEFT's own."""

import copy
from functools import cache

import pytest
import torch
from architectures import ARCHITECTURES, METHODS, adapt
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from lorakit import MultiLoraModel
from lorakit.errors import AdapterIdsError
from lorakit.runtime import ops
from lorakit.runtime.routing import Routing
from lorakit.runtime.stacking import Stacking

LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj", "up_proj", "c_attn", "c_fc"]
INVOCATIONS = {"early": [5, 6], "late": [9, 9, 9]}
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def activated(base, seed, tokens, **options):
    options = {"target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    return adapt(base, seed, alora_invocation_tokens=tokens, **options)


@cache
def family(name="llama"):
    """A base, its PEFT models, and lorakit's model with all of them."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    head = ["lm_head"] if name == "llama" else []
    tenants = {
        "early": activated(base, 0, INVOCATIONS["early"], target_modules=LINEAR + head),
        "late": activated(base, 1, INVOCATIONS["late"], use_rslora=True, lora_bias=True),
        "lora": adapt(base, 2, **METHODS["lora"](architecture)),
        "dora": adapt(base, 3, **METHODS["dora"](architecture)),
        "embeddings": adapt(base, 4, **METHODS["embeddings"](architecture)),
    }
    model = MultiLoraModel(copy.deepcopy(base))
    for tenant in tenants:
        model.load_adapter(tenant, tenants[tenant])
    return base, tenants, model


# The adapter of each row, and its prompt: no invocation, one, two (the last counts), one at the very end.
ROWS = {
    "late": [3, 9, 9, 9, 4, 8, 7, 3, 2, 5],
    "dora": [3, 9, 9, 9, 4, 8, 7, 5, 6, 5],
    "early": [5, 6, 7, 5, 6, 30, 31, 32, 33, 34],
    None: [5, 6, 9, 9, 9, 30, 31, 32, 33, 34],
    "early ": [40, 41, 42, 43, 44, 45, 46, 47, 5, 6],
    "lora": [50, 51, 52, 53, 54, 5, 6, 57, 58, 59],
    "early  ": [60, 61, 62, 63, 64, 65, 6, 5, 68, 69],
    "embeddings": [70, 71, 72, 73, 74, 75, 6, 5, 78, 79],
    "late ": [80, 9, 9, 9, 9, 85, 86, 87, 9, 89],
}
IDS = [name and name.strip() for name in ROWS]


def prompts():
    return torch.tensor(list(ROWS.values()))


def alone(name, tenants, base):
    return tenants[name] if name else base


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_logits_in_a_mixed_batch_equal_pefts(name):
    base, tenants, model = family(name)
    mixed = model(prompts(), adapter_ids=IDS).logits
    plain = base(prompts()).logits
    for row, tenant in enumerate(IDS):
        peft = copy.deepcopy(alone(tenant, tenants, base)).double()
        expected = peft(input_ids=prompts()[row : row + 1]).logits[0]
        assert relative(mixed[row], expected) <= 2e-5
        acts = tenant is not None and row != 6
        assert (relative(plain[row], expected) > 1e-3) == acts
    # Before its invocation a row is the base's.
    torch.testing.assert_close(mixed[2, :3], plain[2, :3], rtol=1e-5, atol=1e-5)
    assert relative(mixed[2, 3:], plain[2, 3:]) > 1e-3


@torch.no_grad()
def test_one_activated_adapter_for_all_rows():
    base, tenants, model = family()
    mixed = model(prompts(), adapter_ids="early").logits
    assert relative(mixed, tenants["early"](input_ids=prompts()).logits) <= 1e-5
    assert relative(mixed, base(prompts()).logits) > 1e-3
    nowhere = torch.randint(10, 60, (3, 4))
    assert torch.equal(model(nowhere, adapter_ids="early").logits, model(nowhere).logits)


@torch.no_grad()
def test_one_that_acts_from_the_first_token_is_a_lora():
    _, tenants, model = family()
    ids = torch.tensor([[5, 6, 40, 41], [5, 6, 42, 43]])
    mixed = model(ids, adapter_ids="early").logits
    assert len(model._adapted.last.batches[0].rows.slots) == 1
    assert relative(mixed, tenants["early"](input_ids=ids).logits) <= 1e-5


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 8])], ids=str)
@torch.no_grad()
def test_logits_of_some_tokens(keep):
    _, _, model = family()
    whole = model(prompts(), adapter_ids=IDS).logits
    kept = model(prompts(), adapter_ids=IDS, logits_to_keep=keep).logits
    expected = whole[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
    assert relative(kept, expected) <= 1e-6


def check_generated(name, padding="left", **options):
    base, tenants, model = family(name)
    pad = 0
    rows = [prompt[row % 2 :] for row, prompt in enumerate(ROWS.values())]  # every other one is shorter
    ids = torch.full((len(rows), 10), pad)
    for row, tokens in enumerate(rows):
        ids[row, -len(tokens) :] = torch.tensor(tokens)
    mask = (ids != pad).long()
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_ids=IDS, **{**GREEDY, **options})
    copies = options.get("num_return_sequences", 1)
    for row, tenant in enumerate(IDS):
        peft = alone(tenant, tenants, base)
        given = {"input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        if tenant in INVOCATIONS and ("num_beams" in options or options.get("use_cache") is False):
            continue  # PEFT refuses beams, and counts its tokens from an end that moves
        expected = peft.generate(**given, **{**GREEDY, **options})
        got = mixed[row * copies : (row + 1) * copies, : expected.shape[1]]
        assert torch.equal(got, expected), tenant
    return mixed


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_greedy_tokens_in_a_mixed_batch_equal_pefts(name):
    generated = check_generated(name)
    base, _, model = family(name)
    plain = base.generate(prompts(), **GREEDY)
    assert not torch.equal(generated[2], plain[2]) and torch.equal(generated[6, -5:], plain[6, -5:])
    assert not base._forward_pre_hooks and not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert all(module.batch is None for module in model._adapted.modules.values())


@torch.no_grad()
def test_padding_on_the_right():
    base, tenants, model = family()
    ids, mask = prompts().clone(), torch.ones(len(IDS), 10, dtype=torch.long)
    ids[2:5, 7:], mask[2:5, 7:] = 0, 0
    mixed = model(ids, attention_mask=mask, adapter_ids=IDS).logits
    for row in (0, 2, 3, 4):
        peft = alone(IDS[row], tenants, base)
        expected = peft(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
        assert relative(mixed[row], expected) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_cache_a_row_begins_where_it_did(name):
    """PEFT counts from the end, which moves; with a cache it is right."""
    assert torch.equal(check_generated(name, use_cache=False), check_generated(name))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_static_cache(name):
    check_generated(name, cache_implementation="static")


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_prompt_in_chunks(size):
    """PEFT lets the adapter act on the last tokens of every chunk; whole prompts it gets right."""
    _, _, model = family()
    expected = model.generate(prompts(), adapter_ids=IDS, **GREEDY)
    got = model.generate(prompts(), adapter_ids=IDS, **GREEDY, prefill_chunk_size=size)
    assert torch.equal(got, expected)


def test_beams_and_returned_sequences():
    _, _, model = family()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    mixed = check_generated("llama", **options)
    assert mixed.shape[0] == 2 * len(IDS)
    ids = prompts()
    mixed = model.generate(ids, adapter_ids=IDS, **options)
    for row, tenant in enumerate(IDS):  # no PEFT to compare with: the same row alone, without a cache
        expected = model.generate(ids[row : row + 1], adapter_ids=[tenant], use_cache=False, **options)
        assert torch.equal(mixed[2 * row : 2 * row + 2], expected)


@pytest.mark.parametrize("row", [0, 2, 4, 6])
def test_several_tokens_a_step(row):
    _, _, model = family()
    ids = prompts()[row : row + 1]
    name = IDS[row]
    expected = model.generate(ids, adapter_ids=[name], **{**GREEDY, "max_new_tokens": 12})
    for options in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": ARCHITECTURES["llama"].build()},
    ):
        got = model.generate(ids, adapter_ids=[name], **{**GREEDY, "max_new_tokens": 12}, **options)
        assert torch.equal(got, expected), options


@pytest.mark.parametrize("row", [0, 2, 4])
def test_a_model_that_is_its_own_assistant(row):
    _, _, model = family()
    ids = prompts()[row : row + 1]
    expected = model.generate(ids, adapter_ids=[IDS[row]], **GREEDY)
    got = model.generate(ids, adapter_ids=[IDS[row]], assistant_early_exit=1, **GREEDY)
    assert torch.equal(got, expected)


def test_a_cache_that_is_continued():
    """The second call is given the whole text, as transformers wants it, or what is new."""
    _, tenants, model = family()
    rows = [0, 2, 3, 4]
    ids, names = prompts()[rows], [IDS[row] for row in rows]
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, adapter_ids=names, past_key_values=cache, **GREEDY)
    longer = torch.cat([first, torch.tensor([[44, 45, 46]] * len(rows))], dim=1)
    fresh = model.generate(longer, adapter_ids=names, **GREEDY)
    assert torch.equal(model.generate(longer, adapter_ids=names, past_key_values=cache, **GREEDY), fresh)

    # A long text of the base, then an adapter is called upon: the cache before is the base's.
    prefix = torch.randint(10, 60, (2, 6))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    call = torch.tensor([[44, 5, 6, 45], [9, 9, 9, 46]])
    whole = torch.cat([prefix, call], dim=1)
    names = ["early", "late"]
    expected = [tenants[name].generate(input_ids=whole[i : i + 1], **GREEDY)[0] for i, name in enumerate(names)]
    got = model.generate(whole, adapter_ids=names, past_key_values=copy.deepcopy(cache), **GREEDY)
    assert torch.equal(got, torch.stack(expected))
    got = model.generate(
        call,
        attention_mask=torch.ones_like(whole),
        adapter_ids=names,
        past_key_values=copy.deepcopy(cache),
        **GREEDY,
    )
    assert torch.equal(got[:, 4:], torch.stack(expected)[:, 10:])
    with torch.no_grad():
        logits = model(call, adapter_ids=names, past_key_values=copy.deepcopy(cache)).logits
        for row, name in enumerate(names):
            assert relative(logits[row], tenants[name](input_ids=whole[row : row + 1]).logits[0, 6:]) <= 1e-5


@torch.no_grad()
def test_a_loop_of_ones_own_says_where_adapters_act():
    """Of a text that continues a cache nobody can see where its invocation was."""
    _, _, model = family()
    ids, names = prompts()[[2, 1, 3]], ["early", "dora", None]
    expected = model.generate(ids, adapter_ids=names, **GREEDY)
    cache = DynamicCache(config=model.config)
    logits = model(ids, adapter_ids=names, past_key_values=cache).logits
    tokens = []
    for _ in range(GREEDY["max_new_tokens"]):
        tokens.append(logits[:, -1:].argmax(-1))
        with pytest.raises(AdapterIdsError, match=r"row 0.*continue a cache.*alora_offsets"):
            model(tokens[-1], adapter_ids=names, past_key_values=cache)
        logits = model(tokens[-1], adapter_ids=names, past_key_values=cache, alora_offsets=[1, None, None]).logits
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, ids.shape[1] :])


@torch.no_grad()
def test_embeddings_tell_no_tokens():
    _, tenants, model = family()
    ids, names = prompts()[[2, 3]], ["early", None]
    embeds = model.model.get_input_embeddings()(ids)
    with pytest.raises(AdapterIdsError, match=r"row 0: adapter 'early'.*input_ids.*alora_offsets"):
        model(inputs_embeds=embeds, adapter_ids=names)
    with pytest.raises(AdapterIdsError, match="alora_offsets"):
        model.generate(inputs_embeds=embeds, adapter_ids=names, **GREEDY)
    offsets = [7, None]
    expected = tenants["early"](input_ids=ids[:1]).logits[0]
    assert relative(model(inputs_embeds=embeds, adapter_ids=names, alora_offsets=offsets).logits[0], expected) <= 1e-5
    generated = model.generate(inputs_embeds=embeds, adapter_ids=names, alora_offsets=offsets, **GREEDY)
    assert torch.equal(generated, model.generate(ids, adapter_ids=names, **GREEDY)[:, ids.shape[1] :])
    assert torch.equal(model.generate(ids, inputs_embeds=embeds, adapter_ids=names, **GREEDY)[:, -5:], generated)


@pytest.mark.parametrize("offsets", [[3], [3, 3], [0, None], [True, None], ["3", None], 3, "ab", [2.0, None]], ids=repr)
def test_offsets_that_do_not_fit_are_refused(offsets):
    _, _, model = family()
    with pytest.raises(AdapterIdsError, match="alora_offsets"):
        model(prompts()[[2, 3]], adapter_ids=["early", None], alora_offsets=offsets)


def test_a_prompt_to_stay_away_from_is_refused():
    _, _, model = family()
    with pytest.raises(AdapterIdsError, match="negative_prompt_ids"):
        model.generate(
            prompts()[2:3], adapter_ids="early", guidance_scale=1.5, negative_prompt_ids=prompts()[2:3], **GREEDY
        )


@torch.no_grad()
def test_a_call_inside_a_call_changes_neither():
    _, _, model = family()
    expected = model.generate(prompts(), adapter_ids=IDS, **GREEDY, use_cache=False)
    inner = model(prompts(), adapter_ids=IDS[::-1]).logits
    plain = model(prompts()).logits

    class Calls(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert torch.equal(model(prompts(), adapter_ids=IDS[::-1]).logits, inner)
            assert torch.equal(model(prompts()).logits, plain)
            return scores

    options = {**GREEDY, "logits_processor": LogitsProcessorList([Calls()]), "use_cache": False}
    assert torch.equal(model.generate(prompts(), adapter_ids=IDS, **options), expected)


def test_decoding_is_served_row_by_row():
    _, _, model = family()
    model.generate(prompts(), adapter_ids=IDS, **GREEDY)
    [batch] = model._adapted.last.batches
    assert isinstance(batch, Stacking) and len(batch.rows.slots) == len(IDS) and not batch.rows.exact


def test_a_failing_call_leaves_nothing_behind():
    _, _, model = family()
    with pytest.raises(Exception, match="index out of range"):
        model.generate(torch.full((2, 4), 10**6), adapter_ids=["early", "lora"], alora_offsets=[2, None], **GREEDY)
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert all(module.batch is None for module in model._adapted.modules.values())


def test_gradients_flow_from_where_it_acts():
    _, tenants, model = family()
    tenant = copy.deepcopy(tenants["early"])
    ids = prompts()[2:4]
    model.model.zero_grad()
    model(ids, adapter_ids=["early", None]).logits[0].sum().backward()
    tenant.requires_grad_(True)
    tenant(input_ids=ids[:1]).logits[0].sum().backward()
    mine = model.model.model.layers[0].mlp.gate_proj.weight.grad
    theirs = tenant.base_model.model.model.layers[0].mlp.gate_proj.weight.grad
    assert relative(mine, theirs) <= 1e-5
    model.model.zero_grad()


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: True)


@cache
def small():
    """Few modules and no more layers than needed: the interpreter is slow."""
    base = ARCHITECTURES["llama"].build()
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}
    tenants = {
        "early": activated(base, 0, INVOCATIONS["early"], **targets),
        "dora": adapt(base, 1, use_dora=True, target_modules=["q_proj", "k_proj"]),
    }
    model = MultiLoraModel(copy.deepcopy(base).to(DEVICE))
    for name, tenant in tenants.items():
        model.load_adapter(name, tenant)
    return base, tenants, model


SMALL = torch.tensor([[40, 5, 6, 41], [5, 6, 42, 43], [44, 45, 5, 6], [5, 6, 5, 6]])
SMALL_IDS = ["early", "dora", None, "early"]


@pytest.mark.parametrize("copies", [1, pytest.param(5, marks=pytest.mark.gpu)], ids=["decoding", "prompts"])
@torch.no_grad()
def test_kernels_give_pefts_logits(with_kernels, copies):
    """Up to 64 tokens take the kernels for decoding, more of them those for prompts: minutes in the interpreter."""
    base, tenants, model = small()
    ids, names = SMALL.repeat(copies, 1), SMALL_IDS * copies
    for _ in range(2):  # the first round finds siblings, the second serves them together
        mixed = model(ids.to(DEVICE), adapter_ids=names).logits.cpu()
        assert all(isinstance(batch, Routing) for batch in model._adapted.last.batches)
        assert model._adapted.last.batches[0].rows.exact
        for row, name in enumerate(SMALL_IDS):
            expected = alone(name, tenants, base)(input_ids=SMALL[row : row + 1]).logits[0]
            for copy_ in range(copies):
                assert relative(mixed[row + 4 * copy_], expected) <= 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 2}, pytest.param({"num_beams": 2}, marks=pytest.mark.gpu)], ids=str
)
def test_kernels_generate_what_stacks_do(monkeypatch, options):
    _, _, model = small()
    ids, options = SMALL.to(DEVICE), {"max_new_tokens": 3, "do_sample": False, **options}
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: False)
    expected = model.generate(ids, adapter_ids=SMALL_IDS, **options)
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: True)
    assert torch.equal(model.generate(ids, adapter_ids=SMALL_IDS, **options), expected)
    assert isinstance(model._adapted.last.batches[0], Routing) and not model._adapted.last.batches[0].rows.exact


@torch.no_grad()
def test_a_compiled_forward_has_no_graph_break(with_kernels):
    _, _, model = small()
    ids = SMALL.to(DEVICE)
    expected = model(ids, adapter_ids=SMALL_IDS).logits
    model = MultiLoraModel(copy.deepcopy(small()[0]).to(DEVICE))
    for name, tenant in small()[1].items():
        model.load_adapter(name, tenant)
    model(ids, adapter_ids=SMALL_IDS)  # finds siblings
    model.model.forward = torch.compile(model.model.forward, fullgraph=True, backend="aot_eager")
    assert relative(model(ids, adapter_ids=SMALL_IDS).logits, expected) <= 1e-6
    with torch.compiler.set_stance("fail_on_recompile"):  # other rows, another beginning
        other = ids[[2, 0, 3, 1]]
        mixed = model(other, adapter_ids=["early", "early", None, "dora"]).logits
    assert relative(mixed[:2], small()[2](other[:2], adapter_ids="early").logits) <= 1e-5


def test_a_compiled_model_generates_the_same():
    base, tenants, _ = small()
    model = MultiLoraModel(copy.deepcopy(base))
    for name, tenant in tenants.items():
        model.load_adapter(name, tenant)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(SMALL, adapter_ids=SMALL_IDS, **options)
    model.compile(backend="eager")
    assert torch.equal(model.generate(SMALL, adapter_ids=SMALL_IDS, **options), expected)
    plain = model.generate(SMALL, **options)
    assert torch.equal(plain, base.generate(SMALL, **options))
