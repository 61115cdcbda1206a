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
from lorakit.adapters.choices import Choices
from lorakit.adapters.convert import convert
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import restore

WEIGHTS = "adapter_model.safetensors"


def tenant_with(
    config: PeftConfig, name: str = "llama", seed: int = 0, spread: float = 0.2, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """An adapter of this configuration on a copy of the base; what training changes is random.

    Args:
        config: PEFT's.
        name: of the architecture.
        seed: of the parameters.
        spread: what a standard normal number is multiplied by, and then added to each parameter.
        dtype: the base's.
    """
    model = get_peft_model(copy.deepcopy(base_of(name, dtype)), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def form_of(source: Any, name: str = "llama", *, dtype: torch.dtype = torch.float32, **chosen: Any) -> AdapterForm:
    """The source's canonical form over the base, by these choices of a user."""
    return convert("tenant", source, BaseModel.of(base_of(name, dtype)), choices=Choices(**chosen))


@torch.no_grad()
def check_exact(
    tenant: PeftModel,
    folder: Path,
    name: str = "llama",
    tolerance: float = 2e-5,
    *,
    svd_energy: float | None = None,
    method: str = "",
) -> AdapterForm:
    """Saves with PEFT, loads with lorakit: the same logits as PEFT's in fp64, also beside a row of the base.

    Also holds that the adapter does something, and that the checkpoint can be given back bit for bit. With an
    `svd_energy` of 1 the same is held of what is converted by SVD. `method` names it in the documentation's table, if
    the form's own name does not.
    """
    save(tenant, folder)
    base = base_of(name)
    model = MultiLoraModel(copy.deepcopy(base))
    model.load_adapter("tenant", folder, svd_energy=svd_energy)
    inputs = ARCHITECTURES[name].inputs(2)
    reference = copy.deepcopy(tenant).double()(**inputs).logits
    plain = base(**inputs).logits
    mixed = model(**inputs, adapter_ids=["tenant", None]).logits
    assert relative(plain, reference) > 1e-3, "the adapter does nothing, so nothing is tested"
    error = relative(mixed[0], reference[0])
    assert error <= tolerance
    assert relative(mixed[1], plain[1]) <= 1e-6
    assert relative(model(**inputs, adapter_ids="tenant").logits, reference) <= tolerance
    form = form_of(folder, name, svd_energy=svd_energy)
    stored, given = load_file(folder / WEIGHTS), restore(form)
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)
    way = "SVD" if form.svd_errors else "exact"
    served(method or form.method, name, places_of(base, list(form.modules)), error, way)
    return form
