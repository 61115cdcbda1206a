"""A base model's fingerprint: tells two bases apart without reading their weights whole.

It holds the architecture, a hash over every place and its shape, and a few hundred single weights spread over the
model, kept as values and not as a hash: the same base loaded in another dtype must still be recognised, and a hash
would not survive the rounding. Knows `BaseModel`; knows no adapter and no file.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import torch

from lorakit.adapters.base import BaseModel
from lorakit.adapters.sharded import picked
from lorakit.errors import BankError, BaseModelMismatchError

_PARAMETERS = 32  # parameters sampled, spread evenly over the model
_VALUES = 16  # values of each


def fingerprint(base: BaseModel) -> dict[str, Any]:
    """The fingerprint of a base, as JSON.

    Returns:
        {"architecture", "model_type", "places": sha256 over (path, kind, in, out) of every place, "sample":
        {parameter name: {"dtype", "numel", "values": base64 of fp32}}}. About 8 kB.
    """
    return {
        "architecture": base.architecture,
        "model_type": base.model_type,
        "places": _hash_places(base),
        "sample": {name: _encode(tensor) for name, tensor in _sample(base).items()},
    }


def short(print_: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that name a fingerprint in a message."""
    return hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:12]


def check(base: BaseModel, expected: dict[str, Any], *, owner: str) -> None:
    """Refuses a base that is not the one that `expected` was taken from.

    The same weights in another dtype pass, as do the places of a quantised base (its packed weights are no longer
    the sampled values, so only its unquantised parameters are compared).

    Args:
        base: the base at hand.
        expected: the fingerprint to meet.
        owner: what was made for the expected base, for the message ("the bank at bank/").

    Raises:
        BaseModelMismatchError: saying what differs.
        BankError: `expected` is no fingerprint.
    """
    try:
        difference = _difference(base, expected)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BankError(f"{owner} has a damaged fingerprint of its base model; export it again.") from error
    if difference:
        raise BaseModelMismatchError(
            f"{owner} was made for another base model than {base.id or base.architecture!r}: {difference}. "
            "Use the base that its adapters were trained on, or export the adapters again for this one."
        )


def _difference(base: BaseModel, expected: dict[str, Any]) -> str:
    if base.architecture != expected["architecture"]:
        return f"it was made for a {expected['architecture']}, this is a {base.architecture}"
    if _hash_places(base) != expected["places"]:
        return "the modules or their shapes differ"
    for name, recorded in expected["sample"].items():
        here = base.stored(name)
        if here is None or not here.is_floating_point() or here.numel() != recorded["numel"]:
            continue  # packed by a quantiser, or offloaded
        if not _same(_decode(recorded), recorded["dtype"], _pick(here)):
            return f"the weights of {name} differ"
    return ""


def _same(recorded: torch.Tensor, recorded_dtype: str, here: torch.Tensor) -> bool:
    """Whether two samples are one set of weights, each rounded to its own dtype."""
    theirs = getattr(torch, recorded_dtype)
    if torch.equal(recorded.to(here.dtype), here) or torch.equal(here.to(theirs).float(), recorded):
        return True
    # fp16 against bf16, both rounded from fp32: one unit in bf16's last place is the closest they can be told apart.
    half = {torch.float16, torch.bfloat16}
    return {theirs, here.dtype} == half and torch.allclose(recorded, here.float(), rtol=2**-7, atol=2**-24)


def _sample(base: BaseModel) -> dict[str, torch.Tensor]:
    """Values from the input embedding, norms and linears alike: any of them may be all that a fine-tune changed."""
    names = sorted(base.parameters)
    step = max(1, len(names) / _PARAMETERS)
    chosen = {names[int(i * step)] for i in range(min(_PARAMETERS, len(names)))}
    tensors = {name: base.stored(name) for name in sorted(chosen)}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()}


def _pick(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `_VALUES` values at fixed places of a tensor, whatever its device."""
    count = tensor.numel()
    return picked(tensor, torch.linspace(0, count - 1, min(_VALUES, count), dtype=torch.float64).long()).cpu()


def _encode(tensor: torch.Tensor) -> dict[str, Any]:
    values = _pick(tensor)
    return {
        "dtype": str(values.dtype).removeprefix("torch."),
        "numel": tensor.numel(),
        "values": base64.b64encode(values.float().numpy().tobytes()).decode(),
    }


def _decode(recorded: dict[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(recorded["values"])), dtype=torch.float32)


def _hash_places(base: BaseModel) -> str:
    table = sorted((path, p.kind, p.in_features, p.out_features) for path, p in base.places.items())
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()
