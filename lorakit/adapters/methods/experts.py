"""LoRA on parameters, by PEFT's `target_parameters`: y = W_e x + b_e + s · B_e A_e x for each expert e.

The weight of a router, a matrix, has factors as a linear module has them, under that module's keys. For experts PEFT
(peft.tuners.lora.layer.ParamWrapper) keeps the factors of all E in two matrices: "A" (E·r, ·), an expert's r rows
together, and "B" (·, r·E), an expert's columns E apart. Which side of the weight "A" is on depends on the version that
made the checkpoint, for a parameter as it is stored, (E, d1, d2):

    before 0.19     always d1, so that for a weight (out, in) PEFT's "A" is our B, and its "B" our A
    0.19.0          d2 for a weight that its module calls transposed, (in, out); else d1
    since 0.19.1    the weight's input: d2, or d1 for a weight that its module calls transposed

Modules have said so since transformers 5; before, none was transposed by this rule. Shapes tell the two sides apart
where d1 and d2 differ. Where they do not, other parameters of the checkpoint tell, and else the version does; what
that leaves open is refused.

A module with several targeted parameters is wrapped once for each, in the order of `named_parameters()`: the last has
the keys "experts.lora_A", the one before it "experts.base_layer.lora_A", and so on.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from packaging.version import InvalidVersion, Version

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import ModuleForm
from lorakit.adapters.methods.options import shown
from lorakit.adapters.methods.parts import check_shape, module_form
from lorakit.adapters.methods.targets import rank_and_scale
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import LAST_OF_EXPERTS, Place
from lorakit.errors import CheckpointError, ModuleNotFoundInBaseError, ShapeMismatchError, UnsupportedMethodError

_A, _B = "lora_A.weight", "lora_B.weight"
_OF_ONE = re.compile(r"(.*\.experts\.[0-9]+\..*)\.lora_[AB]\.weight")
_ON_OUTPUT = "target_parameters.on_output"
"""An extra that is there, empty, where PEFT's "A" is on the weights' output."""


class Split(NamedTuple):
    """A checkpoint in two.

    Attributes:
        rest: the checkpoint without the tensors of parameters.
        modules: parameter path → form.
        extras: what `restore` needs beside the forms.
    """

    rest: Checkpoint
    modules: Mapping[str, ModuleForm]
    extras: Mapping[str, torch.Tensor]


def split(checkpoint: Checkpoint, base: BaseModel) -> Split:
    """Takes the tensors of parameters out of a checkpoint.

    Args:
        checkpoint: a LoRA checkpoint, its options checked.
        base: the base model.

    Raises:
        ModuleNotFoundInBaseError: target_parameters names what the base does not have.
        UnsupportedMethodError: it names a parameter that is no place; nothing says which side A is on; or the
            checkpoint is of experts that were modules.
        CheckpointError: tensors are missing, or contradict each other.
        ShapeMismatchError: tensors do not fit the configuration and the base.
    """
    _refuse_modules(checkpoint, base)
    tensors = dict(checkpoint.tensors)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path, prefix in _prefixes(_targeted(checkpoint, base)).items():
        keys = [f"{prefix}.{_A}", f"{prefix}.{_B}"]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise CheckpointError(
                f"{checkpoint.source}: {path} has no {missing[0]!r}, though target_parameters names it; the file is "
                "incomplete, or was trained on another base."
            )
        found[path] = tensors.pop(keys[0]), tensors.pop(keys[1])
    on_input = _is_on_input(checkpoint, base, found)
    modules = {
        path: _form(base.parameter_places[path], a, b, on_input, *rank_and_scale(checkpoint, path))
        for path, (a, b) in found.items()
    }
    extras = {} if on_input else {_ON_OUTPUT: torch.zeros(0, dtype=torch.uint8)}
    return Split(dataclasses.replace(checkpoint, tensors=tensors), modules, extras)


def restore(modules: Mapping[str, ModuleForm], extras: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors by key.

    Args:
        modules: path → form of a whole adapter; those of parameters are restored.
        extras: of the adapter.

    Returns:
        The extras that are PEFT's, and the parameters' tensors.
    """
    tensors = {key: tensor for key, tensor in extras.items() if key != _ON_OUTPUT}
    parameters = (path for path, module in modules.items() if module.kind in ("experts", "router"))
    for path, prefix in _prefixes(parameters).items():
        module = modules[path]
        assert module.a is not None and module.b is not None
        if module.kind == "router":
            tensors |= {f"{prefix}.{_A}": module.a, f"{prefix}.{_B}": module.b}
            continue
        a, b = (module.b.mT, module.a.mT) if _ON_OUTPUT in extras else (module.a, module.b)
        tensors[f"{prefix}.{_A}"] = a.reshape(-1, a.shape[-1])
        tensors[f"{prefix}.{_B}"] = b.permute(1, 2, 0).reshape(b.shape[1], -1)
    return tensors


def _refuse_modules(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuses what was trained where each expert was modules of its own, as before transformers 5."""
    if not any(place.kind == "experts" for place in base.parameter_places.values()):
        return
    for key in checkpoint.tensors:
        found = _OF_ONE.fullmatch(key)
        if found and found[1] not in base.places:
            # PEFT doubles r and alpha where it joins two modules, which keeps alpha / r and not alpha / √r.
            remedy = (
                "Train it again on this base: PEFT's own conversion scales rsLoRA otherwise."
                if checkpoint.config.get("use_rslora")
                else "Load it with PEFT on this base and save it again, and it is one of parameters."
            )
            raise UnsupportedMethodError(
                f"{checkpoint.source}: {key!r} is of one expert, which this base has as a part of a parameter: the "
                f"adapter was trained with transformers before 5. {remedy}"
            )


def _targeted(checkpoint: Checkpoint, base: BaseModel) -> list[str]:
    """The parameters that PEFT would adapt, in the base's order."""
    names = checkpoint.config.get("target_parameters") or []
    ends = tuple(f".{name}" for name in names)
    paths = [path for path in base.parameters if path in names or path.endswith(ends)] if names else []
    if names and not paths:
        raise ModuleNotFoundInBaseError(
            f"{checkpoint.source}: the base model {base.id or base.architecture!r} ({base.architecture}) has no "
            f"parameter that target_parameters names ({', '.join(names)}); was it trained on another base?"
        )
    others = [path for path in paths if path not in base.parameter_places]
    if others:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: target_parameters names {others[0]!r}, of shape {base.parameters[others[0]]}, which "
            "is neither a weight (experts, ·, ·) of a module with transformers' interface of experts nor a router's, "
            "or is packed by a quantiser; name the modules of other weights with target_modules."
        )
    return paths


def _prefixes(paths: Iterable[str]) -> dict[str, str]:
    """Parameter path → what its keys begin with: each parameter wraps its module once more, the last outermost."""
    by_module: dict[str, list[str]] = {}
    for path in paths:
        by_module.setdefault(path.rpartition(".")[0], []).append(path)
    for members in by_module.values():
        members.sort(key=lambda path: path.endswith(f".{LAST_OF_EXPERTS}"))
    return {
        path: ".".join([module, *["base_layer"] * (len(members) - 1 - index)])
        for module, members in by_module.items()
        for index, path in enumerate(members)
    }


def _form(place: Place, a: torch.Tensor, b: torch.Tensor, on_input: bool, rank: int, scale: float) -> ModuleForm:
    """One parameter's form.

    Args:
        place: where.
        a: PEFT's "A", (E·r, ·); a router's (r, in).
        b: PEFT's "B", (·, r·E); a router's (out, r).
        on_input: whether "A" is on the weight's input.
        rank: r.
        scale: s.
    """
    if place.kind == "router":
        return module_form(place, a, b, scale)
    a = a.reshape(place.experts, rank, -1)
    b = b.reshape(-1, rank, place.experts).permute(2, 0, 1)
    if not on_input:
        a, b = b.mT, a.mT
    return ModuleForm("experts", place.in_features, place.out_features, a.contiguous(), b.contiguous(), scale)


def _is_on_input(
    checkpoint: Checkpoint, base: BaseModel, found: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    """Whether PEFT's "A" is on the weights' input, as it is for all of a checkpoint or for none; checks all shapes."""
    by_shape: dict[bool, str] = {}
    for path, (a, b) in found.items():
        place, (rank, _) = base.parameter_places[path], rank_and_scale(checkpoint, path)
        packed = rank * place.experts
        shapes = {
            True: ((packed, place.in_features), (place.out_features, packed)),
            False: ((packed, place.out_features), (place.in_features, packed)),
        }
        sides = [side for side, shape in shapes.items() if (tuple(a.shape), tuple(b.shape)) == shape]
        if not sides or (place.kind == "router" and True not in sides):
            check_shape(checkpoint.source, f"LoRA A of {path}", a, shapes[True][0])
            check_shape(checkpoint.source, f"LoRA B of {path}", b, shapes[True][1])
        elif len(sides) == 1 and place.kind == "experts":
            by_shape[sides[0]] = path
    if len(by_shape) > 1:
        raise ShapeMismatchError(
            f"{checkpoint.source}: LoRA A is on the input of {by_shape[True]} and on the output of {by_shape[False]}, "
            "as no version of PEFT writes it; save the adapter again."
        )
    if by_shape:
        return next(iter(by_shape))
    experts = {path: place for path in found if (place := base.parameter_places[path]).kind == "experts"}
    return all(_by_version(checkpoint, path, place.transposed) for path, place in experts.items())


def _by_version(checkpoint: Checkpoint, path: str, transposed: bool) -> bool:
    """Whether PEFT's "A" is on the input of a weight whose shape does not tell."""
    # PEFT writes its version since 0.18; a version of its main branch ends in a commit.
    written = checkpoint.config.get("peft_version") or "0.17"
    try:
        version = Version(str(written).partition("@")[0])
    except InvalidVersion as error:
        raise CheckpointError(
            f"{checkpoint.source}: peft_version of adapter_config.json is {shown(written)}, which is no version, and "
            f"{path} is laid out by it; save the adapter again."
        ) from error
    before, since = Version("0.18.1"), Version("0.19.1")
    between = version.is_devrelease and Version(version.base_version) >= before and version < since
    if version >= since:
        return True
    if between or (version >= Version("0.19.0") and transposed):
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {path} is as wide as it is high, and PEFT {version} laid it out in a way that the "
            "checkpoint does not tell (it changed in PEFT 0.19, and depended on the version of transformers); train "
            "the adapter with a newer PEFT."
        )
    return transposed
