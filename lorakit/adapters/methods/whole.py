"""Whole tensors beside an adapter, whatever its method: saved modules, and biases of its own.

PEFT trains them in the base's place and saves what they became: with modules_to_save the parameters of whole modules
(peft.utils.ModulesToSaveWrapper), with bias="all" or "…_only" biases. Here they are set apart before the adapter's
family sees the checkpoint, and put into its form afterwards:

    a linear module or an embedding   w = W', d = b'
    a norm, y = g ⊙ n(x) + b          c = g' / g, d = b' - c b
    a bias b' alone                   d = c (b' - b), added to the adapter's own d

Knows a checkpoint's keys and the base's parameters; knows no method.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.options import TARGETS, check_values, shown
from lorakit.adapters.methods.parts import check_shape, module_form, parameter_of
from lorakit.adapters.methods.targets import targeted
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, UnsupportedMethodError

_BIAS = ".bias"


class Apart(NamedTuple):
    """A checkpoint without its whole tensors.

    Attributes:
        checkpoint: what is left for the family.
        base: the base with the adapter's biases in the place of its own, as the family's formula means them.
        tensors: parameter of the base → the tensor that takes its place.
        keys: the same parameters → their keys in the checkpoint.
        copies: key → tensor, of what PEFT writes beside a saved module where bias="all": its biases once more, and the
            base's.
    """

    checkpoint: Checkpoint
    base: BaseModel
    tensors: Mapping[str, torch.Tensor]
    keys: Mapping[str, str]
    copies: Mapping[str, torch.Tensor]


def set_apart(checkpoint: Checkpoint, base: BaseModel) -> Apart:
    """Takes the whole tensors out of a checkpoint.

    Raises:
        CheckpointError: modules_to_save or bias cannot be meant, or tensors that they name are missing.
    """
    saved = saved_parameters(checkpoint, base)
    biases = _biases(checkpoint, base) - saved
    if not saved and not biases:
        return Apart(_without_bias(checkpoint), base, {}, {}, {})
    keys = {name: key for key in checkpoint.tensors if (name := parameter_of(key)) in saved | biases}
    missing = sorted((saved | biases) - keys.keys())
    if missing:
        option = "modules_to_save" if missing[0] in saved else f"bias={shown(checkpoint.config['bias'])}"
        raise CheckpointError(
            f"{checkpoint.source}: {option} names {missing[0]}, but the file does not hold it; it is incomplete, or "
            "this version of PEFT does not save it for this method."
        )
    tensors = {name: checkpoint.tensors[key].to("cpu") for name, key in keys.items()}
    copies = {key: tensor for key, tensor in checkpoint.tensors.items() if _is_copy(key)}
    taken = {*keys.values(), *copies}
    rest = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in taken}
    own = {name: tensor for name, tensor in tensors.items() if name in biases}
    left = dataclasses.replace(_without_bias(checkpoint), tensors=rest)
    return Apart(left, base.with_parameters(own), tensors, keys, copies)


def put_back(form: AdapterForm, apart: Apart, checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """The form of the whole checkpoint.

    Args:
        form: what the family made of `apart`.
        apart: what `set_apart` gave.
        checkpoint: the whole checkpoint.
        base: the base as it is.

    Raises:
        UnsupportedMethodError: a changed parameter of a module that carries no adapter, or a norm's weight that the
            base has as zero.
        ShapeMismatchError: a tensor of another shape than the base's.
    """
    if not apart.tensors:
        return dataclasses.replace(form, config=dict(checkpoint.config))
    modules, extras = dict(form.modules), {**form.extras, **apart.copies}
    reads_base = form.uses_base_weights
    grouped: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in apart.tensors.items():
        path, _, item = name.rpartition(".")
        grouped[path][item] = tensor
    for path, items in grouped.items():
        place = base.places.get(path)
        _check(checkpoint, base, path, place, items)
        if place is None:
            continue
        if "weight" in items and place.kind != "norm":
            weight = items["weight"]
            turned = place.kind == "linear" and place.transposed
            modules[path] = module_form(place, d=items.get("bias"), w=weight.T if turned else weight)
        else:
            changed = _changed(checkpoint, base, path, place, items, modules.get(path))
            reads_base = True
            if changed is not None:
                modules[path] = changed
    for name, key in apart.keys.items():
        path, _, item = name.rpartition(".")
        tensor = apart.tensors[name]
        whole = item == "weight" and path in modules and modules[path].w is not None
        extras[key] = _stand_in(tensor, base.places[path]) if whole else tensor
    return dataclasses.replace(
        form, modules=modules, config=dict(checkpoint.config), extras=extras, uses_base_weights=reads_base
    )


def give_back(form: AdapterForm, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with the whole weights that the form holds, by key."""
    found = dict(tensors)
    for key, tensor in tensors.items():
        module = form.modules.get(parameter_of(key).removesuffix(".weight"))
        if module is not None and module.w is not None and not tensor.numel():
            weight = module.w.T if tensor.dim() == 2 else module.w
            found[key] = weight.to(tensor.dtype).contiguous()
    return found


def _stand_in(weight: torch.Tensor, place: Place) -> torch.Tensor:
    """Nothing, in the weight's dtype: what the form holds is not kept twice. Of two axes where it holds it turned."""
    return weight.new_empty((0, 0) if place.kind == "linear" and place.transposed else (0,))


def _without_bias(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as if it had no biases. That modules are saved is left to say which ones are not adapted."""
    return dataclasses.replace(
        checkpoint, config={key: "none" if key == "bias" else value for key, value in checkpoint.config.items()}
    )


def _is_copy(key: str) -> bool:
    return key.endswith((".original_module.bias", ".modules_to_save.bias"))


def saved_parameters(checkpoint: Checkpoint, base: BaseModel) -> frozenset[str]:
    """The parameters of modules_to_save, found as peft.utils.other._set_trainable does: by the ends of paths."""
    names = checkpoint.config.get("modules_to_save")
    if not names:
        return frozenset()
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(
            f"{checkpoint.source}: modules_to_save is {shown(names)}; it should be a list of modules' names."
        )
    return frozenset(name for name in base.parameters if any(path.endswith(tuple(names)) for path in above(name)))


def above(parameter: str) -> Iterator[str]:
    """The paths of all modules that a parameter lies in."""
    path = parameter
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _biases(checkpoint: Checkpoint, base: BaseModel) -> frozenset[str]:
    """The biases that an adapter brings (peft.tuners.tuners_utils.BaseTuner._get_learnable_bias_state_dict)."""
    bias = checkpoint.config.get("bias", "none")
    if bias == "none":
        return frozenset()
    every = frozenset(name for name in base.parameters if name.endswith(_BIAS))
    if bias == "all":
        return every
    if isinstance(bias, str) and bias.endswith("_only"):
        check_values(checkpoint, TARGETS)
        return every & {path + _BIAS for path in targeted(checkpoint, base)}
    raise CheckpointError(f"{checkpoint.source}: bias is {shown(bias)}; it should be 'none', 'all' or '…_only'.")


def _check(
    checkpoint: Checkpoint, base: BaseModel, path: str, place: Place | None, items: Mapping[str, torch.Tensor]
) -> None:
    """Refuses tensors that do not fit, or that change a module that carries no adapter."""
    for item, tensor in items.items():
        name = f"{path}.{item}"
        check_shape(checkpoint.source, name, tensor, _shape(base, name, place, item))
        if place is None or item not in ("weight", "bias"):
            there = base.parameter(name)
            if there is None or not torch.equal(there.to("cpu", tensor.dtype), tensor):
                raise UnsupportedMethodError(
                    f"{checkpoint.source}: it brings a {name} of its own, but {path} is no linear module, embedding or "
                    "norm, so it cannot differ from tenant to tenant; train without it in modules_to_save or bias."
                )


def _shape(base: BaseModel, name: str, place: Place | None, item: str) -> tuple[int, ...]:
    """The shape of a parameter, also where a quantiser has packed it."""
    if place is None or item != "weight" or place.kind == "norm":
        return base.parameters[name]
    linear = place.out_features, place.in_features
    return linear[::-1] if place.transposed else linear


def _changed(
    checkpoint: Checkpoint,
    base: BaseModel,
    path: str,
    place: Place,
    items: Mapping[str, torch.Tensor],
    module: ModuleForm | None,
) -> ModuleForm | None:
    """The form of a module with a bias or a norm's weight of its own; None if both are the base's."""
    bias = base.bias(path)
    before = torch.zeros(()) if bias is None else bias.to("cpu", torch.float64)
    after = items["bias"].double() if "bias" in items else before
    if module is not None:
        # The family took the new bias for the base's.
        change = after - before if module.c is None else module.c.double() * (after - before)
        return dataclasses.replace(module, d=(change if module.d is None else module.d.double() + change).float())
    c = _ratio(checkpoint, base, path, place, items["weight"]) if "weight" in items else torch.ones(place.out_features)
    d = (after - c * before).expand_as(c)
    if (c == 1).all() and not d.any():
        return None
    return module_form(place, c=None if (c == 1).all() else c, d=d if d.any() else None)


def _ratio(checkpoint: Checkpoint, base: BaseModel, path: str, place: Place, weight: torch.Tensor) -> torch.Tensor:
    """g' / g of a norm, in fp64."""
    before = base.weight(path).to("cpu", torch.float64) + place.offset
    after = weight.double() + place.offset
    lost = (before == 0) & (after != 0)
    if lost.any():
        raise UnsupportedMethodError(
            f"{checkpoint.source}: the base's norm {path} has a zero in channel {int(lost.nonzero()[0])}, which no "
            "scale makes into the adapter's weight; train without this norm."
        )
    return torch.where(before == after, 1.0, after / torch.where(before == 0, 1.0, before))
