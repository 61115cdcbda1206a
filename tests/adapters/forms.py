"""Random adapters in canonical form."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.form import AdapterForm, ModuleForm

BASE = {"base_id": "org/base", "fingerprint": {"hidden_size": 24, "weights": "ab" * 16}}


def module_form(
    generator: torch.Generator,
    *,
    kind: str = "linear",
    in_features: int = 24,
    out_features: int = 40,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0,
    factors: bool = True,
    c: bool = False,
    d: bool = False,
) -> ModuleForm:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    a_shape = (rank, in_features) if kind == "linear" else (in_features, rank)
    return ModuleForm(
        kind=kind,
        in_features=in_features,
        out_features=out_features,
        a=normal(*a_shape).to(dtype) if factors else None,
        b=normal(out_features, rank).to(dtype) if factors else None,
        scale=scale,
        c=normal(out_features) if c else None,
        d=normal(out_features) if d else None,
    )


def lora_form(
    seed: int = 0,
    *,
    layers: int = 2,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    hidden: int = 24,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    extras: dict[str, torch.Tensor] | None = None,
) -> AdapterForm:
    """A plain LoRA of one recipe: equal arguments but the seed give equal layouts and configurations."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{layer}.self_attn.{target}": module_form(
            generator, in_features=hidden, out_features=hidden, rank=rank, dtype=dtype
        )
        for layer in range(layers)
        for target in targets
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets), "bias": "none"}
    return AdapterForm("lora", modules, config, extras or {})


def odd_form(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> AdapterForm:
    """All there can be: odd shapes, an embedding, whole weights, norms, modules without factors, c and d, extras."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for index in range(12):
        factors = pick.random() < 0.8
        modules[f"model.layers.{index}.proj"] = module_form(
            generator,
            in_features=pick.randint(1, 33),
            out_features=pick.randint(1, 33),
            rank=pick.randint(1, 9),
            dtype=dtype,
            scale=pick.uniform(0.1, 3),
            factors=factors,
            c=pick.random() < 0.5,
            d=pick.random() < 0.5 or not factors,
        )
    modules["model.embed_tokens"] = module_form(
        generator, kind="embedding", in_features=51, out_features=7, rank=3, dtype=dtype
    )
    modules["score"] = ModuleForm(
        "linear", 7, 3, w=torch.randn(3, 7, generator=generator).to(dtype), d=torch.randn(3, generator=generator)
    )
    modules["wpe"] = ModuleForm("embedding", 11, 5, w=torch.randn(11, 5, generator=generator).to(dtype))
    modules["norm"] = ModuleForm("norm", 7, 7, c=torch.randn(7, generator=generator))
    extras = {
        "base_model.model.m.lora_magnitude_vector": torch.randn(13, generator=generator),
        "base_model.model.flag": torch.tensor([True, False, True]),
        "base_model.model.number": torch.tensor(7, dtype=torch.int64),
        "base_model.model.empty": torch.zeros(0, 5, dtype=torch.float16),
        "base_model.model.double": torch.randn(3, 3, generator=generator, dtype=torch.float64),
    }
    config = {"peft_type": "LORA", "use_dora": True, "r": 8}
    return AdapterForm("dora", modules, config, extras, uses_base_weights=True, base_quantisation="gptq 4-bit")


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat)


def assert_same_form(left: AdapterForm, right: AdapterForm) -> None:
    assert (left.method, left.uses_base_weights) == (right.method, right.uses_base_weights)
    assert left.base_quantisation == right.base_quantisation
    assert dict(left.config) == dict(right.config)
    assert left.modules.keys() == right.modules.keys()
    for path, module in left.modules.items():
        other = right.modules[path]
        assert (module.kind, module.in_features, module.out_features) == (
            other.kind,
            other.in_features,
            other.out_features,
        )
        assert (module.rank, module.scale) == (other.rank, other.scale)
        tensors, others = dict(module.tensors()), dict(other.tensors())
        assert tensors.keys() == others.keys()
        assert all(same_bits(tensors[item], others[item]) for item in tensors), path
    assert left.extras.keys() == right.extras.keys()
    assert all(same_bits(tensor, right.extras[key]) for key, tensor in left.extras.items())


def make_bank(path: Path, **forms: AdapterForm) -> AdapterBank:
    bank = AdapterBank.create(path, **BASE)
    bank.add_forms([(name, form, f"runs/{name}") for name, form in forms.items()])
    return bank
