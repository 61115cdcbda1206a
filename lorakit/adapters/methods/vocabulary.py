"""Tokens added to the base's vocabulary: what `resize_token_embeddings` made before training, whatever the method.

PEFT then saves the embedding and the output layer whole, (V + k, D), as saved modules, beside an adapter on them
("base_layer"), or alone (save_embedding_layers); or it saves only the rows that were trained (trainable_token_indices).
Here the base is given the same size before the adapter's family sees it, and its form is cut back to V rows afterwards:

    t = c ⊙ (W'[V:] + s · (B A)[V:]), with the rows of an embedding's Aᵀ or an output layer's B

The first V rows are the form's own where training changed them. Those that are the base's are not kept, and are read
from it again to give the checkpoint back.

Knows a checkpoint's keys and the base's embeddings; knows no method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods import tokens
from lorakit.adapters.methods.parts import parameter_of
from lorakit.adapters.methods.whole import saved_parameters
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import BaseModelNotFoundError, UnsupportedMethodError

_ROWS = ".added_rows"  # after the key of a copy (V + k, D): its last k rows
_FACTOR = ".added_factor"  # after a module's path: the last k rows of an embedding's A or an output layer's B
_WEIGHT = ".added_weight"  # after a module's path: nothing, where a whole weight's first V rows were the base's


class Apart(NamedTuple):
    """A checkpoint without copies of resized weights.

    Attributes:
        checkpoint: what is left.
        base: the base with as many rows as the checkpoint has.
        copies: key → tensor (V + k, D), of the resized weights that the adapter was trained on.
        modules: the modules that grew.
    """

    checkpoint: Checkpoint
    base: BaseModel
    copies: Mapping[str, torch.Tensor]
    modules: frozenset[str]


def set_apart(checkpoint: Checkpoint, base: BaseModel) -> Apart:
    """Finds out whether, and how, the vocabulary was resized.

    Raises:
        UnsupportedMethodError: the rows of some added tokens are not in the checkpoint, or the output layer has a bias.
    """
    paths = {path for path in (base.embedding, base.output, *base.tied) if path in base.places}
    saved = saved_parameters(checkpoint, base)
    copies: dict[str, torch.Tensor] = {}
    resized: dict[str, torch.Tensor] = {}
    within = tuple(paths)
    for key, tensor in checkpoint.tensors.items():
        if not key.startswith(within):
            continue
        name = parameter_of(key)
        path = name.removesuffix(".weight")
        if path not in paths or path == name or not _is_larger(tensor, base.parameters.get(name, ())):
            continue
        if name in saved:
            resized[path] = _padded(base, path, tensor.shape[0])
        else:
            copies[key], resized[path] = tensor, tensor.to("cpu")
    tied = {path for path in paths if path == base.embedding or path in base.tied} if base.tied else set()
    copied = next((path for key in copies if (path := _path_of(key)) in tied), None)
    if copied is not None:
        resized = {**dict.fromkeys(tied, resized[copied]), **resized}
    for path, trained in tokens.trained(checkpoint, base).items():
        size = _vocabulary(base.places[path])
        new = {token for token in trained if token >= size}
        if path in paths - resized.keys() and new:
            if max(new) - size >= len(new):
                raise UnsupportedMethodError(
                    f"{checkpoint.source}: it adds tokens to the vocabulary, but the rows of some of them at {path} "
                    "are not in the checkpoint; save it with PEFT's save_embedding_layers=True."
                )
            resized[path] = _padded(base, path, size + len(new))
    for path in resized:
        if base.bias(path) is not None and base.places[path].kind == "linear":
            raise UnsupportedMethodError(
                f"{checkpoint.source}: it adds tokens to the vocabulary, but {path} has a bias, and one of the added "
                "tokens' has no place here; train without resize_token_embeddings."
            )
    rest = {key: tensor for key, tensor in checkpoint.tensors.items() if key not in copies}
    left = dataclasses.replace(checkpoint, tensors=rest) if copies else checkpoint
    return Apart(left, base.with_rows(resized), copies, frozenset(resized))


def put_back(form: AdapterForm, apart: Apart, checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """The form over the base as it is.

    Args:
        form: of `apart.checkpoint`, over `apart.base`.
        apart: what `set_apart` gave.
        checkpoint: the whole checkpoint.
        base: the base as it is.

    Raises:
        UnsupportedMethodError: the base's own rows were changed before the adapter was trained on them, or the adapter
            adds a bias to added tokens.
    """
    if not apart.modules:
        return form
    modules, extras = dict(form.modules), dict(form.extras)
    for path in sorted(apart.modules):
        there = modules.get(path)
        modules[path] = _cut(checkpoint, apart.base, base, path, there)
        if there is not None and there.b is not None:
            assert there.a is not None
            factor = there.a if there.kind == "embedding" else there.b
            extras[path + _FACTOR] = factor[-modules[path].added :].contiguous()
        if there is not None and there.w is not None and modules[path].w is None:
            extras[path + _WEIGHT] = there.w.new_empty((0,))
    for key, tensor in apart.copies.items():
        extras[key + _ROWS] = tensor[base.parameters[parameter_of(key)][0] :].contiguous()
    return dataclasses.replace(form, modules=modules, extras=extras, uses_base_weights=True)


def joined(form: AdapterForm, base: Callable[[], BaseModel]) -> tuple[AdapterForm, dict[str, torch.Tensor]]:
    """The form as it was before `put_back`, as far as its tensors go; and the copies that were set apart.

    Args:
        form: the form.
        base: opens the base, whose rows it may need.
    """
    if not any(module.added for module in form.modules.values()):
        return form, {}
    modules, extras, copies, opened = {}, dict(form.extras), {}, base()
    for path, module in form.modules.items():
        if module.t is None:
            modules[path] = module
            continue
        a, b, w = module.a, module.b, module.w
        if path + _FACTOR in extras:
            factor = extras.pop(path + _FACTOR)
            a = torch.cat([a, factor]) if module.kind == "embedding" and a is not None else a
            b = torch.cat([b, factor]) if module.kind == "linear" and b is not None else b
        if path + _WEIGHT in extras:
            dtype = extras.pop(path + _WEIGHT).dtype
            w = _rows(opened, path).to(dtype)
        w = None if w is None else torch.cat([w, module.t.to(w.dtype)])
        if a is None and w is None:
            continue
        rows, embedding = _vocabulary(module) + module.added, module.kind == "embedding"
        modules[path] = dataclasses.replace(
            module,
            in_features=rows if embedding else module.in_features,
            out_features=module.out_features if embedding else rows,
            a=a,
            b=b,
            w=w,
            c=None,
            d=None,
            t=None,
        )
    for key in [key for key in extras if key.endswith(_ROWS)]:
        tail, name = extras.pop(key), key.removesuffix(_ROWS)
        path = _path_of(name)
        own = form.modules.get(path)
        first = _rows(opened, path) if own is None or own.w is None or path + _WEIGHT in form.extras else own.w
        copies[name] = torch.cat([first.to(tail.dtype), tail])
    return dataclasses.replace(form, modules=modules, extras=extras), copies


def no_base() -> BaseModel:
    """For `joined` where there is no base.

    Raises:
        BaseModelNotFoundError: always.
    """
    raise BaseModelNotFoundError(
        "an adapter with tokens of its own is given back with the base's rows before them; name its base by base_model."
    )


def _cut(
    checkpoint: Checkpoint, resized: BaseModel, base: BaseModel, path: str, module: ModuleForm | None
) -> ModuleForm:
    """A module's form over V rows, from one over V + k."""
    place = base.places[path]
    first, whole = _rows(base, path), _rows(resized, path)
    size = first.shape[0]
    # A base may be here in a narrower dtype than it was trained in.
    same = torch.equal(first.to(whole.dtype), whole[:size]) or torch.equal(first, whole[:size].to(first.dtype))
    if module is None:
        return ModuleForm(
            place.kind, place.in_features, place.out_features, w=None if same else whole[:size], t=whole[size:]
        )
    if module.w is not None:
        w = None if torch.equal(first.to(module.w.dtype), module.w[:size]) else module.w[:size]
        if module.d is not None:
            raise _biased(checkpoint, path)
        return ModuleForm(place.kind, place.in_features, place.out_features, w=w, t=module.w[size:].contiguous())
    if not same:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: its copy of {path} differs from the base's in its first {size:,} rows, and it has "
            "an adapter there too; give the base that it was trained on."
        )
    embedding = place.kind == "embedding"
    t = whole[size:].double()
    a, b, c, d = module.a, module.b, module.c, module.d
    if a is not None and b is not None:
        tail = a[size:] if embedding else b[size:]
        t = t + module.scale * (tail.double() @ (b.T if embedding else a).double())
    if c is not None:
        t = t * (c if embedding else c[size:].unsqueeze(1)).double()
    if d is not None and (embedding or d[size:].any()):
        raise _biased(checkpoint, path)
    return ModuleForm(
        place.kind,
        place.in_features,
        place.out_features,
        a[:size].contiguous() if a is not None and embedding else a,
        b if b is None or embedding else b[:size].contiguous(),
        module.scale,
        c if c is None or embedding else c[:size].contiguous(),
        None if d is None else d[:size].contiguous(),
        t=t.float(),
    )


def _is_larger(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a parameter's columns, and more rows."""
    return tensor.dim() == 2 and len(shape) == 2 and tensor.shape[1] == shape[1] and tensor.shape[0] > shape[0]


def _rows(base: BaseModel, path: str) -> torch.Tensor:
    """The weight of an embedding or an output layer as (V, D), on the CPU."""
    weight = base.weight(path)
    return (weight.T if base.places[path].kind == "embedding" else weight).to("cpu")


def _padded(base: BaseModel, path: str, rows: int) -> torch.Tensor:
    """The base's weight, and zeros to this many rows."""
    weight = _rows(base, path)
    return torch.cat([weight, weight.new_zeros((rows - weight.shape[0], weight.shape[1]))])


def _path_of(key: str) -> str:
    """The module that a key of a whole weight is of."""
    return parameter_of(key).removesuffix(".weight")


def _vocabulary(module: ModuleForm | Place) -> int:
    return module.in_features if module.kind == "embedding" else module.out_features


def _biased(checkpoint: Checkpoint, path: str) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"{checkpoint.source}: it adds tokens to the vocabulary, and a bias of its own to {path}, which have no form "
        "together; train without the bias."
    )
