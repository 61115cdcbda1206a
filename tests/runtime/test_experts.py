"""Adapters on the parameters of experts, in mixed batches; kernels as in test_routing, without a GPU interpreted."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from architectures import Architecture
from mixtures import EXPERTS, FURTHER, MIXTURES, in_double, mixture_of, one_row, relative, tenant_of
from torch import nn
from transformers.integrations import use_experts_implementation

from lorakit import MultiLoraModel
from lorakit.adapters.places import expert_places_of, parameter_places
from lorakit.errors import AdapterIdsError, UnsupportedMethodError
from lorakit.runtime import ops
from lorakit.runtime.experts import AdaptedExperts, Pairs
from lorakit.runtime.routers import AdaptedRouter
from lorakit.runtime.routing import Routing
from lorakit.runtime.rows import Rows
from lorakit.runtime.stacking import Stacking

ROUTERS = ["gate.weight", "router.weight"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Family:
    """A base, PEFT models, and lorakit's model with all of them."""

    def __init__(self, name, implementation=None, device="cpu", dtype=torch.float32, **options):
        self.name, self.device = name, device
        self.base = copy.deepcopy(mixture_of(name)).to(device, dtype)
        if implementation:
            self.base.set_experts_implementation(implementation)
        self.tenants = {
            "experts": tenant_of(name, 0, self.base),
            "other": tenant_of(name, 1, self.base, target_parameters=["down_proj"], r=7, use_rslora=True),
            "attention": tenant_of(name, 2, self.base, target_modules=["q_proj", "o_proj"], target_parameters=None),
            "both": tenant_of(
                name,
                3,
                self.base,
                target_modules=["v_proj"],
                rank_pattern={r".*1.mlp.experts.gate_up_proj": 9},
                alpha_pattern={"mlp.experts.down_proj": 3},
            ),
            # Where transformers 4 had modules, PEFT makes this every expert and router too.
            "all": tenant_of(name, 4, self.base, target_modules="all-linear", target_parameters=ROUTERS),
        }
        self.model = MultiLoraModel(copy.deepcopy(self.base), **options)
        for tenant, peft in self.tenants.items():
            self.model.load_adapter(tenant, peft)

    def inputs(self, rows, length=7):
        return {key: value.to(self.device) for key, value in MIXTURES[self.name].inputs(rows, length).items()}

    def alone(self, tenant):
        return self.tenants[tenant] if tenant else self.base

    def check(self, ids, length=7, limit=2e-5):
        """Each row's logits are PEFT's own, in fp64; base rows are the base's."""
        inputs = self.inputs(len(ids), length)
        mixed = self.model(**inputs, adapter_ids=ids).logits
        plain = self.base(**inputs).logits
        for row, tenant in enumerate(ids):
            exact = in_double(self.alone(tenant))(**one_row(inputs, row)).logits[0]
            assert relative(mixed[row], exact) <= limit, tenant
            if tenant is None:
                assert relative(mixed[row], plain[row]) <= 1e-6
            else:
                assert relative(plain[row], exact) > 1e-2, "the adapter does nothing, so nothing is tested"
        return mixed


@pytest.fixture(scope="module", params=MIXTURES)
def family(request):
    return Family(request.param)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: True)


@torch.no_grad()
def test_logits_in_a_mixed_batch_equal_pefts(family):
    ids = ["experts", None, "other", "attention", "experts", None, "both", "all"]
    mixed = family.check(ids)
    assert isinstance(family.model._adapted.last.batches[0], Stacking)
    inputs = family.inputs(len(ids))
    assert torch.equal(family.model(**inputs, adapter_ids=ids).logits, mixed)
    assert torch.equal(family.model(**inputs).logits, family.base(**inputs).logits)
    for tenant in ("experts", "all"):
        exact = in_double(family.tenants[tenant])(**inputs).logits
        assert relative(family.model(**inputs, adapter_ids=tenant).logits, exact) <= 2e-5


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_logits_with_every_implementation_of_transformers(name, implementation):
    Family(name, implementation).check(["both", None, "other", "all"])


@pytest.mark.parametrize("name", FURTHER)
@torch.no_grad()
def test_other_bases_with_the_same_interface_are_served(name):
    base = FURTHER[name].build()
    tenant = tenant_of(name, 0, base, target_parameters=[*EXPERTS["target_parameters"], *ROUTERS])
    model = MultiLoraModel(copy.deepcopy(base))
    model.load_adapter("tenant", tenant)
    inputs = FURTHER[name].inputs(2)
    mixed, plain = model(**inputs, adapter_ids=["tenant", None]).logits, base(**inputs).logits
    exact = in_double(tenant)(**one_row(inputs, 0)).logits[0]
    assert relative(mixed[0], exact) <= 2e-5 and relative(plain[0], exact) > 1e-2
    assert relative(mixed[1], plain[1]) <= 1e-6
    kinds = {module.kind for module in model._slot("tenant", keep=()).layout.modules}
    assert kinds == {"experts", "router"}


@torch.no_grad()
def test_greedy_tokens_equal_pefts(family):
    ids = ["other", None, "experts", "attention", "both", "all"]
    inputs = family.inputs(len(ids), 4)
    options = {"max_new_tokens": 6, "do_sample": False}
    mixed = family.model.generate(**inputs, adapter_ids=ids, **options)
    for row, tenant in enumerate(ids):
        assert torch.equal(mixed[row], family.alone(tenant).generate(**one_row(inputs, row), **options)[0])


def poison(model, name):
    for form in model._slot(name, keep=()).modules.values():
        for _, tensor in form.tensors():
            tensor.fill_(float("nan"))
    model._adapted.last = None


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_an_adapter_full_of_nan_reaches_no_other_row(name):
    """To rounding: its own rows take other experts now, and a product's bits depend on how many rows it has."""
    family = Family(name)
    ids = ["experts", "both", None, "other", "both", "attention"]
    inputs = family.inputs(len(ids))
    before = family.model(**inputs, adapter_ids=ids).logits
    poison(family.model, "both")
    after = family.model(**inputs, adapter_ids=ids).logits
    for row, tenant in enumerate(ids):
        assert after[row].isnan().all() if tenant == "both" else relative(after[row], before[row]) <= 1e-6


# One is enough for the interpreter, which takes half a minute for each.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen3-moe" else pytest.mark.gpu) for name in MIXTURES]
)
@torch.no_grad()
def test_kernels_give_pefts_logits(name, kernels):
    family = Family(name, device=DEVICE)
    ids = ["experts", None, "both", "all"]
    first = family.check(ids, length=2)
    assert isinstance(family.model._adapted.last.batches[0], Routing)
    assert torch.equal(family.check(ids, length=2), first)
    assert torch.equal(family.model(**family.inputs(4, 2)).logits, family.base(**family.inputs(4, 2)).logits)


@torch.no_grad()
def test_kernels_serve_adapters_of_different_dtypes(kernels):
    family = Family("qwen3-moe", device=DEVICE)
    tenant = family.tenants["experts"]
    for key, parameter in tenant.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(torch.bfloat16)
    family.model.load_adapter("narrow", tenant)
    for parameter in tenant.parameters():
        parameter.data = parameter.data.float()
    family.tenants["narrow"] = tenant
    assert family.model._slot("narrow", keep=()).dtype == torch.bfloat16
    family.check(["narrow", "other", None], length=2)


@torch.no_grad()
def test_kernels_let_no_nan_reach_another_row(kernels):
    family = Family("gpt-oss", device=DEVICE)
    ids = ["experts", "both", None, "other"]
    inputs = family.inputs(len(ids), 2)
    before = family.model(**inputs, adapter_ids=ids).logits
    poison(family.model, "both")
    after = family.model(**inputs, adapter_ids=ids).logits
    for row, tenant in enumerate(ids):
        assert after[row].isnan().all() if tenant == "both" else relative(after[row], before[row]) <= 1e-6


@torch.no_grad()
def test_kernels_follow_slots_that_come_go_and_move(kernels):
    nbytes = Family("mixtral").model._slot("both", keep=()).nbytes
    family = Family("mixtral", device=DEVICE, adapter_memory=2 * nbytes)
    for tenant in ("experts", "both", "other", "experts"):
        family.check([tenant, None], length=1)
        assert len(family.model._pool.keys) < 4


@torch.no_grad()
def test_sizes_that_kernels_cannot_load_are_served_without_them(kernels):
    mixtral = MIXTURES["mixtral"]
    base = Architecture(mixtral.model, mixtral.config, {**mixtral.options, "intermediate_size": 20}).build()
    tenant = tenant_of("mixtral", 0, base)
    model = MultiLoraModel(copy.deepcopy(base).to(DEVICE))
    model.load_adapter("tenant", tenant)
    inputs = {key: value.to(DEVICE) for key, value in mixtral.inputs(2).items()}
    logits = model(**inputs, adapter_ids=["tenant", None]).logits
    assert isinstance(model._adapted.last.batches[0], Stacking)
    assert relative(logits[0], tenant.to(DEVICE)(**one_row(inputs, 0)).logits[0]) <= 1e-5


def test_gradients_pass(family):
    model, inputs = family.model, family.inputs(2)
    model(**inputs, adapter_ids=["both", None]).logits[0].square().sum().backward()
    mine = {name: parameter.grad for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    tenant = copy.deepcopy(family.tenants["both"])
    tenant.requires_grad_(True)
    tenant(**one_row(inputs, 0)).logits.square().sum().backward()
    for name, parameter in tenant.get_base_model().named_parameters():
        if "lora_" not in name:
            assert relative(mine[name.replace("base_layer.", "")], parameter.grad) <= 1e-4, name


@torch.no_grad()
def test_two_models_on_one_base_do_not_get_in_each_others_way(family):
    base = copy.deepcopy(family.base)
    models = {tenant: MultiLoraModel(base) for tenant in ("experts", "both")}
    inputs = family.inputs(2)
    for tenant, model in models.items():
        model.load_adapter(tenant, family.tenants[tenant])
    for _ in range(2):
        for tenant, model in models.items():
            logits = model(**inputs, adapter_ids=[tenant, None]).logits
            assert relative(logits[0], family.tenants[tenant](**one_row(inputs, 0)).logits[0]) <= 1e-5
    assert torch.equal(base(**inputs).logits, family.base(**inputs).logits)


@torch.no_grad()
def test_offloaded_experts_and_routers_are_served(family):
    """Their weights are on the meta device, but inside the forward that accelerate puts in the place of theirs."""
    base = copy.deepcopy(family.base)
    for owner in {path.rpartition(".")[0] for path in parameter_places(base)}:
        module = base.get_submodule(owner)
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=dict(module.state_dict()))
        add_hook_to_module(module, hook)
        assert next(module.parameters()).is_meta
    model = MultiLoraModel(base)
    model.load_adapter("all", family.tenants["all"])
    inputs = family.inputs(2)
    mixed = model(**inputs, adapter_ids=["all", None]).logits
    assert torch.equal(mixed, family.model(**inputs, adapter_ids=["all", None]).logits)


@torch.no_grad()
def test_arguments_may_be_named(family):
    """The models give them in order, but their names are the forward's own."""
    model = family.model
    model(**family.inputs(2), adapter_ids=["experts", None])
    path = next(path for path in model._adapted.modules if path.endswith("down_proj"))
    experts = model.model.get_submodule(path.rpartition(".")[0])
    x, chosen, weights = torch.randn(2, 32), torch.tensor([[0, 1], [1, 2]]), torch.rand(2, 2)
    names = list(type(experts).forward.__wrapped__.__code__.co_varnames[1:4])
    with model._batch(["experts", None], (x,), {}):
        in_order = experts(x, chosen, weights)
        named = experts(**dict(reversed([*zip(names, (x, chosen, weights), strict=True)])))
    assert torch.equal(named, in_order)
    assert not torch.allclose(experts(x, chosen, weights)[0], in_order[0])


def test_tokens_that_do_not_lie_row_by_row_are_refused():
    pairs = Pairs("model.experts", 7, torch.arange(7), torch.zeros(7, dtype=torch.int64), 2)
    with pytest.raises(AdapterIdsError, match=r"model\.experts was given 7 tokens for 2 adapter_ids"):
        pairs.keys(torch.tensor([0, -1]))


def test_the_key_of_a_pair_is_its_adapter_and_expert():
    token, expert = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 0, 2, 2, 0])
    keys = Pairs("experts", 4, token, expert, 3).keys(torch.tensor([2, -1], dtype=torch.int32))
    assert keys.tolist() == [7, 6, -1, -1, -1]


def test_packed_experts_are_refused(family):
    model = MultiLoraModel(copy.deepcopy(family.base))
    model.load_adapter("experts", family.tenants["experts"])
    for module in model.model.modules():
        if expert_places_of(module):
            module.down_proj = nn.Parameter(module.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedMethodError, match=r"experts.*packed by a quantiser"):
        model(**family.inputs(2), adapter_ids=["experts", None])


def test_experts_that_are_spread_over_devices_are_refused(family):
    experts = copy.deepcopy(next(module for module in family.base.modules() if expert_places_of(module)))
    experts._is_expert_parallel = True
    with pytest.raises(UnsupportedMethodError, match=r"'mlp\.experts'.*several devices"):
        AdaptedExperts("mlp.experts", experts)


def test_a_transformers_that_computes_them_otherwise_is_refused(family, monkeypatch):
    monkeypatch.setattr("lorakit.runtime.experts._moe", object())
    experts = copy.deepcopy(next(module for module in family.base.modules() if expert_places_of(module)))
    with pytest.raises(UnsupportedMethodError, match="transformers .* in a way that this lorakit does not know"):
        AdaptedExperts("mlp.experts", experts)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_experts_without_a_gate_and_with_a_norm_are_served(implementation):
    """As NemotronH's and Muse Spark's are."""

    @use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = 3
            self.up_proj, self.up_proj_bias = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 8))
            self.down_proj, self.down_proj_bias = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(3, 4))
            self.act_fn, self.post_expert_norm = nn.SiLU(), nn.RMSNorm(4)

        def forward(self, hidden_states, chosen, weights):
            raise AssertionError("the implementation is configured")

    class Deltas:
        """A batch whose only adapter changes every expert's weight, in the first row."""

        def route(self, pairs):
            return pairs, pairs.keys(torch.tensor([0, -1]))

        def add_experts(self, parameter, y, x, routed):
            pairs, keys = routed
            share = torch.einsum("poi,pi->po", deltas[parameter.path][pairs.expert], x)
            return torch.where(keys[:, None] >= 0, y + share, y)

    experts = Experts(SimpleNamespace(_experts_implementation=implementation))
    deltas = {"experts.up_proj": torch.randn(3, 8, 4), "experts.down_proj": torch.randn(3, 4, 8)}
    changed = copy.deepcopy(experts)
    for path, delta in deltas.items():
        getattr(changed, path.rpartition(".")[2]).data += delta
    x, weights = torch.randn(6, 4), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 2], [0, 1], [2, 0]])
    plain, expected = experts(x, chosen, weights), changed(x, chosen, weights)
    adapted = AdaptedExperts("experts", experts)
    assert torch.equal(experts(x, chosen, weights), plain)
    for parameter in adapted.parameters.values():
        parameter.batch = Deltas()
    mixed = experts(x, chosen, weights)
    torch.testing.assert_close(mixed[:3], expected[:3])
    assert torch.equal(mixed[3:], plain[3:])


@torch.no_grad()
def half_precision(name, dtype, device):
    """The errors of lorakit and of PEFT against fp64; all experts are chosen, as a rounded router may choose others."""
    experts = "num_experts" if name == "qwen3-moe" else "num_local_experts"
    base = copy.deepcopy(mixture_of(name, **{experts: 2})).to(device, dtype)
    tenant = tenant_of(name, 0, base)  # PEFT keeps its factors in fp32
    model = MultiLoraModel(base)
    model.load_adapter("tenant", tenant)
    inputs = {key: value.to(device) for key, value in MIXTURES[name].inputs(16).items()}
    exact = in_double(tenant)(**inputs).logits
    return [
        relative(logits, exact) for logits in (model(**inputs, adapter_ids="tenant").logits, tenant(**inputs).logits)
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_bf16_is_no_further_from_fp64_than_peft(name):
    ours, pefts = half_precision(name, torch.bfloat16, "cpu")
    assert 1e-5 < ours <= 1.1 * pefts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_half_precision_on_a_gpu_is_no_further_from_fp64_than_peft(name, dtype):
    ours, pefts = half_precision(name, dtype, "cuda")
    assert 1e-5 < ours <= 1.1 * pefts


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_a_forward_may_be_captured_in_a_cuda_graph(implementation):
    """Nothing waits for the device, so that a replay takes new tokens through their rows' adapters."""
    # torch's own grouped_mm can be captured in bf16 alone.
    dtype = torch.bfloat16 if implementation == "grouped_mm" else torch.float32
    family = Family("qwen3-moe", implementation, device="cuda", dtype=dtype)
    ids = ["both", None, "all", "other"]
    inputs, others = family.inputs(4), {"input_ids": family.inputs(4)["input_ids"].flip(1)}
    expected = [family.model(**each, adapter_ids=ids, use_cache=False).logits for each in (inputs, others)]
    tokens = inputs["input_ids"].clone()
    with family.model._batch(ids, (tokens,), {}):
        graph = torch.cuda.CUDAGraph()
        family.model.model(tokens, use_cache=False)
        with torch.cuda.graph(graph):
            logits = family.model.model(tokens, use_cache=False).logits
        for each, wanted in zip((inputs, others), expected, strict=True):
            tokens.copy_(each["input_ids"])
            graph.replay()
            assert relative(logits, wanted) <= 1e-5


@torch.no_grad()
def test_a_compiled_model_serves_them(kernels):
    family = Family("qwen3-moe", device=DEVICE)
    ids = ["both", None, "all"]
    expected = family.check(ids, length=1)
    family.model.model.forward = torch.compile(family.model.model.forward, fullgraph=True, backend="aot_eager")
    compiled = family.model(**family.inputs(3, 1), adapter_ids=ids).logits
    assert relative(compiled, expected) <= 1e-5


class Router(nn.Module):
    """Chooses by its weight, in the way that it is told."""

    def __init__(self, multiply):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.weight).topk(2).indices


class Turning:
    """A batch whose adapter makes a router choose by the opposite order."""

    rows = Rows((None,))

    def add(self, module, y, x):
        return -y


@pytest.mark.parametrize(
    "multiply",
    [
        nn.functional.linear,
        lambda x, weight: nn.functional.linear(x.double(), weight.to(torch.float64)),
        lambda x, weight: nn.functional.linear(x.type(torch.float64), weight.type(torch.float64)),
        lambda x, weight: nn.functional.linear(x.float(), weight.float()),
    ],
    ids=["plain", "to", "type", "float"],
)
def test_a_router_chooses_by_the_sum(multiply):
    router = Router(multiply)
    adapted = AdaptedRouter("gate.weight", router)
    x = torch.randn(5, 4)
    scores = x @ router.weight.T
    assert torch.equal(router(x), scores.topk(2).indices)
    adapted.batch = Turning()
    assert torch.equal(router(x), (-scores).topk(2).indices)
    assert torch.equal(nn.functional.linear(x, router.weight), scores), "nothing is intercepted outside"


def test_a_router_whose_product_is_not_seen_is_refused():
    router = Router(lambda x, weight: x @ weight.T)
    adapted = AdaptedRouter("gate.weight", router)
    adapted.batch = Turning()
    with pytest.raises(UnsupportedMethodError, match=r"'gate\.weight' cannot be served"):
        router(torch.randn(5, 4))
