"""PEFT adapters of any method with every parameter random, and what each must hold after its export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES
from compatibility import places_of, served
from peft import PeftConfig, PeftModel, get_peft_model
from peft_folders import Tensors, base_of, edit_config, edit_tensors, relative, save
from safetensors.torch import load_file

from lorakit import MultiLoraModel
from lorakit.adapters.base import BaseModel
from lorakit.adapters.choices import Choices
from lorakit.adapters.convert import convert
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods import FAMILIES, full_rank, restore

WEIGHTS = "adapter_model.safetensors"

SMALL: dict[str, Callable[..., PeftConfig]] = {
    "ADALORA": partial(peft.AdaLoraConfig, init_r=3, total_step=10, lora_alpha=5),
    "ADAMSS": partial(peft.AdamssConfig, r=12, num_subspaces=3, subspace_rank=2),
    "BEFT": peft.BeftConfig,
    "DEFT": partial(peft.DeftConfig, r=4),
    "DELORA": partial(peft.DeloraConfig, r=4, delora_lambda=3),
    "GLORA": partial(peft.GloraConfig, r=2, config_A_B="vector", config_C="lora", config_D_E="constant"),
    "GRALORA": partial(peft.GraloraConfig, r=4, alpha=6, gralora_k=2, hybrid_r=1),
    "HRA": partial(peft.HRAConfig, r=4, init_weights=False),
    "IA3": partial(peft.IA3Config, feedforward_modules=[]),
    # Whatever is targeted: it is for norms alone.
    "LN_TUNING": lambda target_modules: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "LOHA": partial(peft.LoHaConfig, r=4, alpha=6, init_weights=False),
    "LOKR": partial(peft.LoKrConfig, r=2, alpha=6, init_weights=False),
    "LORA": partial(peft.LoraConfig, r=4, lora_alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}),
    "MISS": partial(peft.MissConfig, r=4),
    "PEANUT": partial(peft.PeanutConfig, r=6, depth=1),
    "POLY": partial(peft.PolyConfig, r=4, n_splits=2),
    "PSOFT": partial(peft.PsoftConfig, r=6, psoft_alpha=4),
    "PVERA": partial(peft.PveraConfig, r=4),
    "TINYLORA": partial(peft.TinyLoraConfig, r=2, u=5, weight_tying=0.5),
    "TRAINABLE_TOKENS": lambda target_modules: peft.TrainableTokensConfig(token_indices=[3, 5]),
    "UNILORA": partial(peft.UniLoraConfig, r=3, theta_d_length=50, save_indices=True),
    "VBLORA": partial(peft.VBLoRAConfig, r=3, num_vectors=9, vector_length=8, topk=3, save_only_topk_weights=True),
    "VERA": partial(peft.VeraConfig, r=4),
}
"""PEFT type → a small configuration of it, to be given `target_modules`; each family of lorakit has one."""

_NO_SKLEARN = pytest.mark.skipif(find_spec("sklearn") is None, reason="PEFT's AdaMSS needs scikit-learn")


def each_family(*without: str) -> pytest.MarkDecorator:
    """A test for every PEFT type that lorakit has an exact family for, but for these."""
    methods = [name for name, family in sorted(FAMILIES.items()) if family is not full_rank and name not in without]
    return pytest.mark.parametrize(
        "method", [pytest.param(name, marks=_NO_SKLEARN if name == "ADAMSS" else ()) for name in methods]
    )


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


def check_refused(
    folder: Path,
    error: type[Exception],
    match: str,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Any] | None = None,
    name: str = "llama",
) -> None:
    """Holds that a saved checkpoint is refused once it is edited.

    Args:
        folder: the checkpoint; edited in place.
        error: of this type.
        match: what its message says.
        config: fields of its configuration to change, as `edit_config` takes them.
        tensors: changes its tensors in place, as for `edit_tensors`.
        name: of the architecture.
    """
    edit_config(folder, **(config or {}))
    if tensors is not None:
        edit_tensors(folder, tensors)
    with pytest.raises(error, match=match):
        form_of(folder, name)


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
    stored, given = load_file(folder / WEIGHTS), restore(form, lambda: BaseModel.of(base))
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)
    way = "SVD" if form.svd_errors else "exact"
    served(method or form.method, name, places_of(base, list(form.modules)), error, way)
    return form
