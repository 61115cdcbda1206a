"""Tokens of an adapter's own: rows of an embedding that it replaces, whatever its method.

PEFT trains such rows beside an adapter (trainable_token_indices: peft.utils.other.TrainableTokensWrapper) or alone
(peft.TrainableTokensConfig), and saves what they became, R (n, D). With E (V, n) one-hot, W' = W + E (R − W[tokens]):

    an embedding, y = W[id]       A = E, so that a token's lookup gives its place, and B = (R − W[tokens])ᵀ
    an output layer, y = W x      A = R − W[tokens], B = E

at rank n, up to the rounding of one fp32 sum. Where an output layer is tied to the embedding, PEFT's rows act there as
well. The factors cost n (V + D) numbers a module; a whole weight, V D numbers, takes their place where it is smaller.

Knows a checkpoint's keys and the base's embeddings; knows no method.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.options import MOST_ELEMENTS, is_whole, maps_to, shown
from lorakit.adapters.methods.parts import check_shape, module_form
from lorakit.adapters.methods.targets import place_at
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place
from lorakit.errors import CheckpointError, UnsupportedMethodError

_OPTION = "trainable_token_indices"
_ITEM = ".token_adapter.trainable_tokens_delta"
# Ends the name of an extra (n, 0) that says: the last n ranks of this module are tokens.
_MARK = ".token_adapter.ranks"


class Rows(NamedTuple):
    """The rows that an adapter replaces at a module.

    Attributes:
        tokens: their n indices, all different.
        rows: (n, D), what they become.
    """

    tokens: tuple[int, ...]
    rows: torch.Tensor


class Apart(NamedTuple):
    """A checkpoint without its tokens.

    Attributes:
        checkpoint: what is left.
        keys: key → tensor, of the rows.
        modules: module path → its rows, also of modules tied to an embedding.
    """

    checkpoint: Checkpoint
    keys: Mapping[str, torch.Tensor]
    modules: Mapping[str, Rows]


def set_apart(checkpoint: Checkpoint, base: BaseModel) -> Apart:
    """Takes the tokens out of a checkpoint, if its method has them.

    Raises:
        CheckpointError: trainable_token_indices cannot be meant, or rows are missing or are not of its tokens.
        ModuleNotFoundInBaseError: the base lacks the module.
    """
    if not _has_tokens(checkpoint):
        return Apart(checkpoint, {}, {})
    wanted = _wanted(checkpoint, base)
    keys = {key: tensor for key, tensor in checkpoint.tensors.items() if key.endswith(_ITEM)}
    modules = {}
    for key, tensor in keys.items():
        path = key.removesuffix(_ITEM)
        tokens = next((tokens for name, tokens in wanted.items() if path.endswith(name)), None)
        if tokens is None and path in base.tied and _is_same(tensor, keys.get(f"{base.embedding}{_ITEM}")):
            continue  # PEFT writes them again where it saves embeddings whole
        if tokens is None:
            raise CheckpointError(
                f"{checkpoint.source}: there are rows for tokens of {path}, which {_OPTION} does not name, so PEFT "
                "would not use them; save the adapter again."
            )
        modules[path] = rows_of(checkpoint, base, path, tokens, tensor)
    modules = with_tied(modules, base)
    for name in wanted:
        if not any(path.endswith(name) for path in modules):
            raise CheckpointError(
                f"{checkpoint.source}: {_OPTION} names {name!r}, but the file holds no rows for it; it is incomplete, "
                "or was trained on another base."
            )
    left = dataclasses.replace(
        checkpoint,
        config={key: value for key, value in checkpoint.config.items() if key != _OPTION},
        tensors={key: tensor for key, tensor in checkpoint.tensors.items() if key not in keys},
    )
    return Apart(left, keys, modules)


def trained(checkpoint: Checkpoint, base: BaseModel) -> dict[str, list[int]]:
    """Module path → the tokens whose rows it replaces there, also at modules tied to an embedding."""
    if checkpoint.peft_type == "TRAINABLE_TOKENS":
        value, item = checkpoint.config.get("token_indices"), _ITEM.removeprefix(".token_adapter")
        named = [key.removesuffix(item) for key in checkpoint.tensors if key.endswith(item)]
        wanted = {key: list(value) for key in named} if isinstance(value, list) and are_tokens(value) else {}
    else:
        wanted = _wanted(checkpoint, base) if _has_tokens(checkpoint) else {}
    paths = {key.removesuffix(_ITEM) for key in checkpoint.tensors if key.endswith(_ITEM)} | wanted.keys()
    there = {
        path: tokens for path in paths for name, tokens in wanted.items() if path in base.places and path.endswith(name)
    }
    return {**dict.fromkeys(base.tied, there[base.embedding]), **there} if base.embedding in there else there


def put_back(form: AdapterForm, apart: Apart, checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """The form of the whole checkpoint.

    Args:
        form: of `apart.checkpoint`.
        apart: what `set_apart` gave.
        checkpoint: the whole checkpoint.
        base: the base.

    Raises:
        UnsupportedMethodError: the same module also has an adapter that rows cannot be added to, or they are too large.
    """
    if not apart.modules:
        return form
    modules, extras = dict(form.modules), {**form.extras, **apart.keys}
    for path, rows in apart.modules.items():
        there = modules.get(path)
        module = changed(checkpoint, base, path, rows, factors_only=there is not None)
        modules[path] = module if there is None else _sum(checkpoint, form, path, there, module)
        extras[path + _MARK] = torch.empty((module.rank, 0))
    config = dict(checkpoint.config)
    return dataclasses.replace(form, modules=modules, config=config, extras=extras, uses_base_weights=True)


def without(form: AdapterForm) -> AdapterForm:
    """The form as it was before `put_back`, save for its configuration; the rows are among its extras."""
    marks = {key.removesuffix(_MARK): mark for key, mark in form.extras.items() if key.endswith(_MARK)}
    if not marks:
        return form
    modules = {}
    for path, module in form.modules.items():
        if path in marks:
            kept = module.rank - marks[path].shape[0]
            if module.a is None or module.b is None or kept <= 0:
                continue
            a = module.a[:kept] if module.kind == "linear" else module.a[:, :kept]
            module = dataclasses.replace(module, a=a, b=module.b[:, :kept], d=None)
        modules[path] = module
    extras = {key: tensor for key, tensor in form.extras.items() if not key.endswith(_MARK)}
    return dataclasses.replace(form, modules=modules, extras=extras)


def are_tokens(value: object) -> bool:
    """A list of tokens' indices."""
    return isinstance(value, list) and all(map(is_whole, value))


def rows_of(checkpoint: Checkpoint, base: BaseModel, path: str, tokens: list[int], rows: torch.Tensor) -> Rows:
    """Rows of a module, checked.

    Args:
        checkpoint: the checkpoint.
        base: the base.
        path: an embedding, or an output layer.
        tokens: their indices.
        rows: (n, D), what they become.

    Raises:
        CheckpointError: a token comes twice, or is none of the base's.
        ShapeMismatchError: other rows than one a token, of the module's width.
        ModuleNotFoundInBaseError: no such module.
    """
    place = place_at(checkpoint, base, path)
    vocabulary, width = _sizes(place)
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"{checkpoint.source}: token {twice} of {path} is named twice; save the adapter again.")
    if place.kind == "norm" or (place.kind == "linear" and place.transposed):
        raise UnsupportedMethodError(f"{checkpoint.source}: {path} is no embedding or output layer and has no tokens.")
    if max(tokens, default=0) >= vocabulary:
        raise CheckpointError(
            f"{checkpoint.source}: it trained token {max(tokens)} of {path}, but the base has {vocabulary} there, from "
            "0 on; was it trained on another base, or on one with a larger vocabulary?"
        )
    check_shape(checkpoint.source, f"the rows for tokens of {path}", rows, (len(tokens), width))
    return Rows(tuple(tokens), rows)


def with_tied(modules: Mapping[str, Rows], base: BaseModel) -> dict[str, Rows]:
    """The same with the modules that are tied to an embedding among them: they share its rows, or have their own."""
    if base.embedding is None or base.embedding not in modules:
        return dict(modules)
    return {**dict.fromkeys(sorted(base.tied), modules[base.embedding]), **modules}


def changed(
    checkpoint: Checkpoint, base: BaseModel, path: str, rows: Rows, *, factors_only: bool = False
) -> ModuleForm:
    """The form of a module whose rows are replaced.

    Args:
        checkpoint: the checkpoint.
        base: the base.
        path: the module's path.
        rows: its rows.
        factors_only: never as a whole weight.

    Raises:
        UnsupportedMethodError: more numbers than an adapter may have.
    """
    place = place_at(checkpoint, base, path)
    vocabulary, width = _sizes(place)
    tokens = torch.tensor(rows.tokens, dtype=torch.int64)
    factors, whole = len(tokens) * (vocabulary + width), vocabulary * width
    as_whole = whole < factors and not factors_only
    if (size := whole if as_whole else factors) > MOST_ELEMENTS:
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {len(tokens):,} tokens of {path} take {size:,} numbers, more than the "
            f"{MOST_ELEMENTS:,} that an adapter may; train fewer tokens."
        )
    weight = base.weight(path)
    weight = (weight.T if place.kind == "embedding" else weight).to("cpu")  # (V, D)
    new = rows.rows.to("cpu")
    # PEFT's layer leaves an output layer's bias out (peft.tuners.trainable_tokens.TrainableTokensLayer.forward).
    bias = base.bias(path) if place.kind == "linear" else None
    if as_whole:
        dtype = torch.promote_types(weight.dtype, new.dtype)
        return module_form(place, w=weight.to(dtype).index_copy(0, tokens, new.to(dtype)))
    change = (new.double() - weight[tokens].double()).float()
    places = torch.zeros(len(tokens), vocabulary).scatter_(1, tokens.unsqueeze(1), 1)
    a, b = (places, change.T) if place.kind == "embedding" else (change, places.T)
    return module_form(place, a, b, d=None if bias is None else -bias.to("cpu", torch.float32))


def _has_tokens(checkpoint: Checkpoint) -> bool:
    """Whether the option is set, and PEFT's class has it."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING.get(checkpoint.peft_type)
    return bool(checkpoint.config.get(_OPTION)) and config is not None and hasattr(config, _OPTION)


def _is_same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


def _wanted(checkpoint: Checkpoint, base: BaseModel) -> dict[str, list[int]]:
    """The end of a module's path → its tokens."""
    value = checkpoint.config[_OPTION]
    if are_tokens(value):
        # Where a model names no input embedding, PEFT looks for one of this name.
        return {base.embedding or "embed_tokens": value}
    if isinstance(value, Mapping) and all(value) and maps_to(value, are_tokens):
        return dict(value)
    raise CheckpointError(
        f"{checkpoint.source}: {_OPTION} is {shown(value)}; it should be a list of tokens' indices, or a mapping from "
        "modules' names to such lists."
    )


def _sizes(place: Place) -> tuple[int, int]:
    """V and D."""
    sizes = place.in_features, place.out_features
    return sizes if place.kind == "embedding" else sizes[::-1]


def _sum(checkpoint: Checkpoint, form: AdapterForm, path: str, there: ModuleForm, added: ModuleForm) -> ModuleForm:
    """An output layer's form with another method's factors, and tokens tied to it: ranks add up."""
    plain = there.b is not None and there.c is None and there.d is None and there.scale
    if there.kind != "linear" or not plain or form.uses_base_weights or form.method not in ("lora", "rslora"):
        raise UnsupportedMethodError(
            f"{checkpoint.source}: {path} has tokens of its own, and also an adapter of the method {form.method!r}, "
            f"which they cannot be added to; train without {path} in target_modules or modules_to_save."
        )
    assert there.a is not None and there.b is not None and added.a is not None and added.b is not None
    a = torch.cat([there.a.float(), added.a / there.scale])
    return dataclasses.replace(there, a=a, b=torch.cat([there.b.float(), added.b], dim=1), d=added.d)
