"""Adapters on the parameters of experts, in mixed batches."""

import copy

import pytest
import torch
from mixtures import MIXTURES, in_double, mixture_of, one_row, relative, tenant_of

from lorakit import MultiLoraModel

IDS = ["experts", None, "other", "attention", "experts", None]


class Family:
    """A base, PEFT models, and lorakit's model with all of them."""

    def __init__(self, name, implementation=None, device="cpu"):
        self.name, self.device = name, device
        base = mixture_of(name)
        self.tenants = {
            "experts": tenant_of(name, 0),
            "other": tenant_of(name, 1, target_parameters=["down_proj"], r=7, use_rslora=True),
            "attention": tenant_of(name, 2, target_modules=["q_proj", "o_proj"], target_parameters=None),
            "both": tenant_of(name, 3, target_modules=["v_proj"], rank_pattern={r".*1.mlp.experts.gate_up_proj": 9}),
        }
        self.model = MultiLoraModel(copy.deepcopy(base).to(device))
        if implementation:
            self.model.model.set_experts_implementation(implementation)
        for tenant, peft in self.tenants.items():
            self.model.load_adapter(tenant, peft)
        self.base = base.to(device)
        self.tenants = {tenant: peft.to(device) for tenant, peft in self.tenants.items()}

    def inputs(self, rows, length=7):
        return {key: value.to(self.device) for key, value in MIXTURES[self.name].inputs(rows, length).items()}

    def alone(self, tenant):
        return self.tenants[tenant] if tenant else self.base


@pytest.fixture(scope="module", params=MIXTURES)
def family(request):
    return Family(request.param)


@torch.no_grad()
def test_logits_in_a_mixed_batch_equal_pefts(family):
    ids = [*IDS, "both"]
    inputs = family.inputs(len(ids))
    mixed = family.model(**inputs, adapter_ids=ids).logits
    plain = family.base(**inputs).logits
    for row, tenant in enumerate(ids):
        exact = in_double(family.alone(tenant))(**one_row(inputs, row)).logits[0]
        assert relative(mixed[row], exact) <= 2e-5, tenant
        assert tenant is None or relative(plain[row], exact) > 1e-2, "the adapter does nothing, so nothing is tested"
        if tenant is None:
            assert relative(mixed[row], plain[row]) <= 1e-6
    assert torch.equal(family.model(**inputs, adapter_ids=ids).logits, mixed)
    assert torch.equal(family.model(**inputs).logits, plain)
