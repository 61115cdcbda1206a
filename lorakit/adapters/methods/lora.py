"""LoRA and its plain variants: rsLoRA, rank_pattern, alpha_pattern, lora_bias; Linear, Conv1D and Embedding.

y = W x + b + s · B A x, with s = alpha / r, or alpha / √r for rsLoRA (peft.tuners.lora.LoraLayer). DoRA adds its
channel scale in dora.py; adapters on the parameters of experts are in experts.py. Factors that are stored packed are
unpacked by bdlora.py and qalora.py; methods that change the base's weights are brought to the base as it is by pissa.py
(also OLoRA) and kasa.py, which doubles the rank. An adapter that acts from its invocation tokens on (alora.py) has the
same form. Which options are served, lora_options.py says.

Sources: Hu et al. 2021 (arXiv 2106.09685); Kalajdzievski 2023, rsLoRA (arXiv 2312.03732); peft.LoraConfig.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import get_args

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, Kind, ModuleForm
from lorakit.adapters.methods import alora, bdlora, dora, experts, kasa, pissa, qalora
from lorakit.adapters.methods.lora_options import check_options
from lorakit.adapters.methods.parts import check_items, check_shape, module_form, parts_of
from lorakit.adapters.methods.targets import place_at, rank_and_scale, targeted
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import ShapeMismatchError, UnsupportedMethodError

# What a key can end with, and what that is. Values are (factor, kind of place).
_FACTORS = {
    "lora_A.weight": ("a", "linear"),
    "lora_B.weight": ("b", "linear"),
    "lora_embedding_A": ("a", "embedding"),
    "lora_embedding_B": ("b", "embedding"),
}
_BIAS = "lora_B.bias"
# Methods whose A and B are made from the checkpoint's.
_REBUILT = ("pissa", "olora", "kasa", "bdlora", "qalora")


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a LoRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    config = checkpoint.config
    check_options(checkpoint)
    alora.check(checkpoint, base)
    rest, parameters, extras = experts.split(checkpoint, base)
    grouped: Mapping[str, Mapping[str, torch.Tensor]] = {}
    if rest.tensors or not parameters or targeted(rest, base):
        grouped = parts_of(rest, base, "a LoRA", (*_FACTORS, _BIAS, dora.MAGNITUDE, kasa.DIAGONAL)).modules
    wanted = {kind: _wanted(checkpoint, kind) for kind in get_args(Kind)}
    modules = {path: _module(checkpoint, base, path, items, wanted) for path, items in grouped.items()}
    method = _method(checkpoint)
    # What A and B alone cannot give back to PEFT: DoRA's magnitudes, and biases, which the form holds scaled; all of
    # it where A and B are not the checkpoint's own.
    kept = (dora.MAGNITUDE, _BIAS, *(_FACTORS if method in _REBUILT else ()), kasa.DIAGONAL)
    own = {f"{path}.{item}": items[item] for path, items in grouped.items() for item in kept if item in items}
    reads_base = bool(config.get("use_dora")) or method in ("pissa", "olora", "kasa")
    return AdapterForm(method, {**modules, **parameters}, dict(config), {**own, **extras}, reads_base)


def restore(form: AdapterForm) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by key."""
    tensors = experts.restore(form.modules, form.extras)
    for path, module in form.modules.items():
        for item, (factor, kind) in _FACTORS.items():
            tensor = getattr(module, factor)
            if kind == module.kind and tensor is not None and form.method not in _REBUILT:
                transposed = kind == "embedding" and factor == "a"
                tensors[f"{path}.{item}"] = tensor.T.contiguous() if transposed else tensor
    return tensors


def _method(checkpoint: Checkpoint) -> str:
    """The method's short name: of the options that are set, the one that changes the most."""
    config = checkpoint.config
    options = {
        "kasa": kasa.is_kasa(checkpoint),
        alora.METHOD: alora.is_alora(checkpoint),
        "bdlora": bdlora.is_bdlora(checkpoint),
        "qalora": config.get("use_qalora"),
        "dora": config.get("use_dora"),
        "rslora": config.get("use_rslora"),
    }
    return pissa.method_of(checkpoint) or next((name for name, value in options.items() if value), "lora")


def _module(
    checkpoint: Checkpoint,
    base: BaseModel,
    path: str,
    items: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Collection[str]],
) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor: A (r, in), B (out, r), and bias or magnitude (out) or diagonal (r).
        wanted: kind of place → the ends of the keys that a module there has.
    """
    source = checkpoint.source
    place = place_at(checkpoint, base, path)
    factors = {}
    for item, tensor in items.items():
        factor, kind = _FACTORS.get(item, (None, None))
        if kind not in (None, place.kind):
            raise ShapeMismatchError(
                f"{source}: {path} is an adapter for another kind of module than its {place.kind}."
            )
        if factor is not None:
            factors[factor] = tensor
    if place.kind == "embedding" and alora.is_alora(checkpoint):
        raise UnsupportedMethodError(
            f"{source}: {alora.INVOCATION} on the embedding {path} is not served: PEFT has it for linear modules alone."
        )
    check_items(checkpoint, path, items, wanted[place.kind])
    rank, scale = rank_and_scale(checkpoint, path)
    group = qalora.group_size(checkpoint, factors["a"], place.in_features)
    blocks = bdlora.blocks(checkpoint, place, path)
    expected = {"a": (rank, place.in_features // group), "b": (place.out_features, rank)}
    for factor, count in blocks.items():
        expected[factor] = bdlora.packed_shape(checkpoint, path, expected[factor], count)
    for factor, tensor in factors.items():
        if tensor.shape != expected[factor]:
            check_shape(source, f"LoRA {factor.upper()} of {path}", tensor, expected[factor])
    for factor, count in blocks.items():
        factors[factor] = bdlora.unpack(factors[factor], count)

    a, b = qalora.unpool(factors["a"], group), factors["b"]
    c = d = None
    form_scale = scale * qalora.scale_of(place.in_features, group)
    if pissa.method_of(checkpoint):
        a, b = pissa.factors(checkpoint, base, path, a, b, scale)
    if kasa.DIAGONAL in items:
        check_shape(source, f"the KaSA diagonal of {path}", items[kasa.DIAGONAL], (rank,))
        a, b = kasa.factors(checkpoint, base, path, a, b, scale, items[kasa.DIAGONAL])
        form_scale = 1.0
    if dora.MAGNITUDE in items:
        magnitude = items[dora.MAGNITUDE]
        check_shape(source, f"the magnitude vector of {path}", magnitude, (place.out_features,))
        c, d = dora.channel_scale(base, path, a, b, scale, magnitude)
    if _BIAS in items:
        check_shape(source, f"the LoRA bias of {path}", items[_BIAS], (place.out_features,))
        d = scale * items[_BIAS].float()
    return module_form(place, a, b, form_scale, c, d)


def _wanted(checkpoint: Checkpoint, kind: Kind) -> list[str]:
    """The ends of the keys that a module of a kind has."""
    there = {
        **{item: of == kind for item, (_, of) in _FACTORS.items()},
        dora.MAGNITUDE: checkpoint.config.get("use_dora"),
        _BIAS: checkpoint.config.get("lora_bias"),
        kasa.DIAGONAL: kasa.is_kasa(checkpoint),
    }
    return [item for item, wanted in there.items() if wanted]
