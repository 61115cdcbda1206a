"""The segmented backend in the model: on a GPU as it is, elsewhere in Triton's interpreter."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, METHODS, adapt

from lorakit import MultiLoraModel
from lorakit.runtime import ops
from lorakit.runtime.routing import Routing
from lorakit.runtime.stacking import Stacking

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: True)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def cast(tenant, dtype):
    for name, parameter in tenant.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def inputs_of(name, rows):
    inputs = ARCHITECTURES[name].inputs(rows, length=2)  # few tokens: the interpreter runs them one by one
    return {key: tensor.to(DEVICE) for key, tensor in inputs.items()}


class Family:
    """A base, a PEFT model a method, and lorakit's model with all of them."""

    def __init__(self, name, methods, dtypes=None, **options):
        architecture = ARCHITECTURES[name]
        base = architecture.build()
        self.name = name
        self.tenants = {method: adapt(base, i, **METHODS[method](architecture)) for i, method in enumerate(methods)}
        self.model = MultiLoraModel(copy.deepcopy(base).to(DEVICE), **options)
        for method, tenant in self.tenants.items():
            cast(tenant, (dtypes or {}).get(method, torch.float32))
            self.model.load_adapter(method, tenant)
            cast(tenant, torch.float32)  # PEFT would round x to the adapter's dtype
        self.base = base.to(DEVICE)
        self.tenants = {method: tenant.to(DEVICE) for method, tenant in self.tenants.items()}

    def check(self, ids, limit=1e-5):
        """Each row's logits are PEFT's own."""
        inputs = inputs_of(self.name, len(ids))
        mixed = self.model(**inputs, adapter_ids=ids).logits
        assert isinstance(self.model._adapted.last.batches[0], Routing)
        for row, method in enumerate(ids):
            alone = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            expected = (self.tenants[method] if method else self.base)(**alone).logits[0]
            assert relative(mixed[row], expected) <= limit, method
        return mixed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", pytest.param("gpt2", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_logits_in_a_mixed_batch_equal_pefts(name):
    family = Family(name, ["lora", "dora", "embeddings", "saved", "biases"])
    ids = ["dora", None, "embeddings", "saved", "lora", "biases", "dora"]
    first = family.check(ids)
    assert torch.equal(family.check(ids), first)


@torch.no_grad()
def test_adapters_of_different_dtypes_share_a_batch():
    family = Family("llama", ["lora", "rslora"], dtypes={"lora": torch.bfloat16})
    assert family.model._slot("lora", keep=()).dtype == torch.bfloat16
    assert family.model._slot("rslora", keep=()).dtype == torch.float32
    family.check(["lora", "rslora", None])


@torch.no_grad()
def test_addresses_follow_slots_that_come_go_and_move():
    """Room for one of them and little more: calls evict, and indices are used again."""
    nbytes = Family("llama", ["lora"]).model._slot("lora", keep=()).nbytes
    family = Family("llama", ["lora", "rslora", "rank_pattern"], adapter_memory=3 * nbytes)
    for method in ("lora", "rslora", "rank_pattern", "lora"):
        family.check([method, None])
        assert len(family.model._pool.keys) < 3


@torch.no_grad()
def test_an_adapter_full_of_nan_changes_no_other_row_by_a_bit():
    family = Family("llama", ["lora", "dora"])
    ids = ["lora", "dora", None]
    before = family.check(ids)
    family.model._slot("dora", keep=()).memory.view(torch.float32).fill_(float("nan"))
    after = family.model(**inputs_of("llama", 3), adapter_ids=ids).logits
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert after[1].isnan().all()


def test_where_gradients_are_wanted_the_batch_is_stacked():
    family = Family("llama", ["lora"])
    family.model(**inputs_of("llama", 2), adapter_ids=["lora", None]).logits.sum().backward()
    assert isinstance(family.model._adapted.last.batches[0], Stacking)
    assert family.model.model.get_input_embeddings().weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_compiled_model_has_no_graph_break_at_an_adapter():
    family = Family("llama", ["lora", "dora"])
    ids = ["lora", None, "dora"]
    expected = family.check(ids)
    family.model.model.forward = torch.compile(family.model.model.forward, fullgraph=True, backend="aot_eager")
    compiled = family.model(**inputs_of("llama", 3), adapter_ids=ids).logits
    assert relative(compiled, expected) <= 1e-6
    with torch.compiler.set_stance("fail_on_recompile"):
        family.check(["dora", "lora", "lora"], limit=2e-5)


@torch.no_grad()
def test_siblings_are_found_by_what_they_are_given():
    family = Family("llama", ["lora"])
    model = family.model
    alone = family.check(["lora", None])
    groups = [
        [module.path.split(".", 2)[-1] for module in group.modules]
        for group in dict.fromkeys(model._adapted.siblings.values())
    ]
    assert ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"] in groups
    assert ["1.mlp.gate_proj", "1.mlp.up_proj"] in groups
    assert ["0.self_attn.o_proj"] in groups
    assert torch.equal(family.check(["lora", None]), alone)
    plain = family.base(**inputs_of("llama", 2)).logits
    assert torch.equal(model(**inputs_of("llama", 2)).logits, plain)


@torch.no_grad()
def test_siblings_that_part_are_served_alone():
    """A sibling that is not called, or with another input, must not leave its share to anyone else."""
    family = Family("llama", ["lora"])
    model, ids = family.model, ["lora", None]
    expected = family.check(ids)
    attention = model.model.model.layers[0].self_attn
    group = model._adapted.siblings["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 32, device=DEVICE)
    with model._batch(ids, (x,), {}):
        q = attention.q_proj(x)
        again = attention.q_proj(x)  # k and v are not called in between
        v = attention.v_proj(x.clone())
    assert torch.equal(q, again) and group.batch is None and not group._done
    with model._batch(ids, (x,), {}):
        torch.testing.assert_close(attention.v_proj(x), v)
    assert torch.equal(family.check(ids), expected)


@torch.no_grad()
def test_two_models_on_one_base_do_not_get_in_each_others_way():
    base = ARCHITECTURES["llama"].build().to(DEVICE)
    tenants = [adapt(base, seed, target_modules="all-linear") for seed in range(2)]
    models = [MultiLoraModel(base) for _ in tenants]
    inputs = inputs_of("llama", 2)
    for model, tenant in zip(models, tenants, strict=True):
        model.load_adapter("tenant", tenant)
    with (
        torch.enable_grad()
    ):  # stacked: the second model hooks modules now, and takes their forwards over after the first
        models[1](**inputs, adapter_ids=["tenant", None])
    for _ in range(2):  # the first round finds siblings, the second serves them together
        for model, tenant in zip(models, tenants, strict=True):
            logits = model(**inputs, adapter_ids=["tenant", None]).logits
            assert relative(logits[0], tenant(**{key: value[:1] for key, value in inputs.items()}).logits[0]) <= 1e-5
