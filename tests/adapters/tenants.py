"""PEFT adapters of any method with every parameter random, and what each must hold after its export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from compatibility import places_of, served
from peft import PeftConfig, PeftModel, get_peft_model
from peft_folders import base_of, relative, save
from safetensors.torch import load_file

from lorakit import MultiLoraModel
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import restore

WEIGHTS = "adapter_model.safetensors"


def tenant_with(config: PeftConfig, name: str = "llama", seed: int = 0, spread: float = 0.2) -> PeftModel:
    """An adapter of this configuration on a copy of the base; what training changes is random.

    Args:
        config: PEFT's.
        name: of the architecture.
        seed: of the parameters.
        spread: what a standard normal number is multiplied by, and then added to each parameter.
    """
    model = get_peft_model(copy.deepcopy(base_of(name)), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def form_of(source: Any, name: str = "llama") -> AdapterForm:
    """The source's canonical form over the base."""
    return convert("tenant", source, BaseModel.of(base_of(name)))


@torch.no_grad()
def check_exact(tenant: PeftModel, folder: Path, name: str = "llama", tolerance: float = 2e-5) -> AdapterForm:
    """Saves with PEFT, loads with lorakit: the same logits as PEFT's in fp64, also beside a row of the base.

    Also holds that the adapter does something, and that the checkpoint can be given back bit for bit.
    """
    save(tenant, folder)
    base = base_of(name)
    model = MultiLoraModel(copy.deepcopy(base))
    model.load_adapter("tenant", folder)
    inputs = ARCHITECTURES[name].inputs(2)
    reference = copy.deepcopy(tenant).double()(**inputs).logits
    plain = base(**inputs).logits
    mixed = model(**inputs, adapter_ids=["tenant", None]).logits
    assert relative(plain, reference) > 1e-3, "the adapter does nothing, so nothing is tested"
    error = relative(mixed[0], reference[0])
    assert error <= tolerance
    assert relative(mixed[1], plain[1]) <= 1e-6
    assert relative(model(**inputs, adapter_ids="tenant").logits, reference) <= tolerance
    form = form_of(folder, name)
    stored, given = load_file(folder / WEIGHTS), restore(form, lambda: BaseModel.of(base))
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)
    served(form.method, name, places_of(base, list(form.modules)), error)
    return form
