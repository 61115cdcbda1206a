"""The same promises on a GPU: fidelity, isolation, determinism, compiled generation, moves between devices."""

import copy

import pytest
import torch
import vision as towers
from architectures import ARCHITECTURES, METHODS, adapt

from lorakit import MultiLoraModel

pytestmark = pytest.mark.gpu

NAMES = ["llama", "gemma3", "gpt2", "t5", "bert"]


def on_gpu(inputs):
    return {key: tensor.cuda() for key, tensor in inputs.items()}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(params=NAMES)
def family(request):
    """A base on the GPU, one PEFT model a method, and lorakit's model with all of them."""
    architecture = ARCHITECTURES[request.param]
    base = architecture.build()
    tenants = {method: adapt(base, i, **options(architecture)) for i, (method, options) in enumerate(METHODS.items())}
    model = MultiLoraModel(copy.deepcopy(base).cuda())
    for method, tenant in tenants.items():
        model.load_adapter(method, tenant)
    return architecture, base.cuda(), {method: tenant.cuda() for method, tenant in tenants.items()}, model


@torch.no_grad()
def test_logits_in_a_mixed_batch_equal_pefts(family):
    architecture, base, tenants, model = family
    ids = [None, *METHODS, "lora"]
    inputs = on_gpu(architecture.inputs(len(ids)))
    mixed = model(**inputs, adapter_ids=ids).logits
    for row, method in enumerate(ids):
        alone = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        expected = (tenants[method] if method else base)(**alone).logits[0]
        assert relative(mixed[row], expected) <= 1e-5, method
    assert torch.equal(model(**inputs, adapter_ids=ids).logits, mixed)


@torch.no_grad()
def test_an_adapter_full_of_nan_changes_no_other_row_by_a_bit(family):
    architecture, _, _, model = family
    ids = ["lora", "dora", None, "embeddings", "dora", "lora"]
    inputs = on_gpu(architecture.inputs(len(ids)))
    before = model(**inputs, adapter_ids=ids).logits
    for module in model._slot("dora", keep=()).modules.values():
        for _, tensor in module.tensors():
            assert tensor.is_cuda
            tensor.fill_(float("nan"))
    model._adapted.last = None
    after = model(**inputs, adapter_ids=ids).logits
    for row, tenant in enumerate(ids):
        assert after[row].isnan().all() if tenant == "dora" else torch.equal(before[row], after[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", ["lora", "dora", "embeddings"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_is_no_further_from_fp64_than_peft(name, method, dtype):
    architecture = ARCHITECTURES[name]
    base = architecture.build(dtype)
    tenant = adapt(base, 0, **METHODS[method](architecture))
    model = MultiLoraModel(base.cuda())
    model.load_adapter("tenant", tenant)
    inputs = on_gpu(architecture.inputs(64))
    reference = copy.deepcopy(tenant).cuda().double()(**inputs).logits
    allowed = 1.1 * relative(tenant.cuda()(**inputs).logits, reference)
    assert relative(model(**inputs, adapter_ids="tenant").logits, reference) <= allowed


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic cache", "static cache"])
def test_greedy_tokens_equal_pefts(options):
    """transformers compiles the forward by itself when the cache is static."""
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    tenants = {name: adapt(base, seed, target_modules="all-linear") for seed, name in enumerate("abc")}
    model = MultiLoraModel(copy.deepcopy(base).cuda())
    for name, tenant in tenants.items():
        model.load_adapter(name, tenant)
    ids = ["b", None, "a", "c", "a"]
    prompts = architecture.inputs(len(ids))["input_ids"].cuda()
    for order in (ids, ids[::-1]):
        mixed = model.generate(prompts, adapter_ids=order, max_new_tokens=8, do_sample=False, **options)
        for row, name in enumerate(order):
            alone = (tenants[name] if name else base).cuda()
            expected = alone.generate(input_ids=prompts[row : row + 1], max_new_tokens=8, do_sample=False)
            assert torch.equal(mixed[row], expected[0])


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"cache_implementation": "static", "prefill_chunk_size": 4}],
    ids=["dynamic cache", "static cache", "compiled chunks"],
)
@torch.no_grad()
def test_adapters_that_begin_in_the_middle_of_their_rows(options):
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    early = adapt(base, 0, target_modules="all-linear", alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    tenants = {"early": early, "lora": adapt(base, 1, target_modules="all-linear")}
    model = MultiLoraModel(copy.deepcopy(base).cuda())
    for name, tenant in tenants.items():
        model.load_adapter(name, tenant)
    ids = ["early", "lora", None, "early", "early"] * 8
    prompts = architecture.inputs(len(ids), length=12)["input_ids"]
    prompts[0::5, 7:9] = prompts[3::5, 0:2] = prompts[1::5, 3:5] = torch.tensor([5, 6])
    prompts = prompts.cuda()
    alone = {name: tenant.cuda() for name, tenant in tenants.items()} | {None: base.cuda()}
    logits = model(prompts, adapter_ids=ids).logits
    generated = model.generate(prompts, adapter_ids=ids, max_new_tokens=8, do_sample=False, **options)
    for row in range(5):
        one = alone[ids[row]]
        assert relative(logits[row], one(input_ids=prompts[row : row + 1]).logits[0]) <= 1e-5
        expected = one.generate(input_ids=prompts[row : row + 1], max_new_tokens=8, do_sample=False)
        assert torch.equal(generated[row], expected[0])


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_each_image_by_its_own_rows_adapter(name):
    base, tenants, _ = towers.family(name)
    model = MultiLoraModel(copy.deepcopy(base).cuda())
    for tenant in tenants:
        model.load_adapter(tenant, tenants[tenant])
    inputs, alone = towers.inputs_of(name, [1, 2, 0, 3])
    ids = ["0", "1", "1", None]
    for _ in range(2):  # the first round finds siblings, the second serves them together
        mixed = model(**on_gpu(inputs), adapter_ids=ids).logits
        for row, tenant in enumerate(ids):
            one = copy.deepcopy(tenants[tenant] if tenant else base).cuda()
            keep = alone[row]["attention_mask"][0].bool()
            assert relative(mixed[row][keep], one(**on_gpu(alone[row])).logits[0][keep]) <= 1e-5


@torch.no_grad()
def test_a_model_may_move_between_devices():
    architecture = ARCHITECTURES["llama"]
    base = architecture.build()
    model = MultiLoraModel(base)
    model.load_adapter("tenant", adapt(base, 0, target_modules="all-linear"))
    inputs = architecture.inputs(2)
    here = model(**inputs, adapter_ids=["tenant", None]).logits
    there = model.cuda()(**on_gpu(inputs), adapter_ids=["tenant", None]).logits
    assert relative(there.cpu(), here) <= 1e-5
    back = model.cpu()(**inputs, adapter_ids=["tenant", None]).logits
    assert torch.equal(back, here)
