"""Quantised modules of a base: the W that one multiplies with, and a name for how it was made.

Quantisers keep W packed, each in its own way. Most can unpack it; where one cannot, the module itself is asked, as it
gives W for an identity matrix. Knows modules and a configuration; knows no adapter and no file.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from lorakit.adapters.places import own_tensors, place_of

FULL_PRECISION = ""
"""The name of a base that no quantiser has touched."""

_PLAIN = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_ROWS = 1024  # of the identity, in memory at once
_LONGEST = 200  # characters of a name, as a checkpoint's configuration may hold anything
_DEEPEST = 8  # levels of a configuration that are read

_KERNEL = "mm_config"  # torchao's, of how it multiplies

# The options that decide what W becomes, in the order in which they are named, and how.
_WORDS = {
    "load_in_4bit": "4-bit",
    "load_in_8bit": "8-bit",
    "bits": "{}-bit",
    "nbits": "{}-bit",
    "num_bits": "{}-bit",
    "weights": "{}",
    "bnb_4bit_quant_type": "{}",
    "bnb_4bit_use_double_quant": "double",
    "_type": "{}",
    "weight_dtype": "{}",
    "group_size": "group {}",
}


def is_packed(module: nn.Module) -> bool:
    """Whether a linear or an embedding keeps its weight in another form than W itself."""
    weight = getattr(module, "weight", None)
    if hasattr(module, "W_q") or not isinstance(weight, torch.Tensor):
        return True  # HQQ's layers; GPTQ's, AWQ's and others, which have no weight at all
    return weight.dtype not in _PLAIN or _unpacks_itself(weight) or _is_torchao(weight)


def is_weightless(module: nn.Module) -> bool:
    """Whether a linear keeps no weight that it could unpack, as GPTQ's and AWQ's: their kernels may keep a bias in an
    order of their own, too.
    """
    unpacks = isinstance(getattr(module, "weight", None), torch.Tensor) or hasattr(module, "W_q")
    return place_of(module) is not None and not unpacks


@torch.no_grad()
def bias_of(module: nn.Module) -> torch.Tensor:
    """b (out,) of a weightless module that has a bias: what it gives for zeros.

    Raises:
        Exception: as `dequantised`.
    """
    return _product_with_zeros(module)[0]


def dequantised(module: nn.Module) -> torch.Tensor:
    """W of a packed module in memory, one that `is_packed`.

    Returns:
        (out, in), on the module's device. In the dtype that the quantiser gives, where it unpacks W. Else in that of
        its scales, mostly float16, and each value as the module multiplies with it, which is rounded to that dtype.

    Raises:
        Exception: whatever the quantiser raises, for example where it has no kernel for this device.
    """
    weight = getattr(module, "weight", None)
    with torch.no_grad():
        if hasattr(module, "W_q"):
            unpacked: torch.Tensor = module.dequantize()  # type: ignore[operator]
        elif _is_packed_again(weight):
            unpacked = _product_with_identity(module)
        elif type(weight).__name__ in ("Params4bit", "Int8Params"):
            # PEFT's function for a module would put a new weight into it.
            unpacked = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
        elif weight is not None and _unpacks_itself(weight):
            unpacked = weight.dequantize()
        else:
            unpacked = _product_with_identity(module)
    return unpacked.detach()


def quantisation(model: nn.Module) -> str:
    """How the weights of a base were quantised: a name to show, and to compare with another base's.

    It holds the method and the options that decide what W becomes. Two bases of one name can still differ where the
    method looks at data, as GPTQ and AWQ do.

    Args:
        model: a live model, or one on the meta device with its checkpoint's configuration.

    Returns:
        Such as "bitsandbytes 4-bit nf4" or "gptq 4-bit group 128"; `FULL_PRECISION` where nothing is quantised.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return " + ".join(sorted(set(_packed_kinds(model))))
    to_dict = getattr(config, "to_dict", dict)
    options: Any = config if isinstance(config, Mapping) else to_dict()
    found: dict[str, set[str]] = {}
    for name, value in _scalars(options):
        found.setdefault(name, set()).add(str(value))
    four = "load_in_4bit" in found
    words = [
        word.format(value)
        for name, word in _WORDS.items()
        if four or not name.startswith("bnb_4bit")  # given also for 8 bits, where they mean nothing
        for value in sorted(found.get(name, ()))
    ]
    method = min(found.get("quant_method", ("quantised",)))
    return " ".join(dict.fromkeys([method, *words]))[:_LONGEST]


def in_words(quantisation: str) -> str:
    """A name that `quantisation` gave, as the end of a sentence on a base."""
    return f"quantised by {quantisation}" if quantisation else "in full precision"


def _scalars(options: Any, inside: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """The options that are set, nested ones too, each under its name."""
    if not isinstance(options, Mapping) or depth > _DEEPEST:
        return
    for name, value in options.items():
        value = getattr(value, "value", value)  # an Enum's
        if name == _KERNEL:
            continue
        if isinstance(value, Mapping):
            yield from _scalars(value, name, depth + 1)
        elif name == "_data" and isinstance(value, str):
            yield inside, value  # torchao's form of a dtype
        elif name == "_type":
            if str(value).endswith("Config"):
                yield name, value
        elif value is True or (isinstance(value, str | int) and value is not False):
            yield name, value


def _packed_kinds(model: nn.Module) -> Iterator[str]:
    """What to call the packed modules of a model whose configuration says nothing of them."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not is_packed(module) or place_of(module) is None:
            continue
        if hasattr(module, "W_q"):
            meta = getattr(module, "meta", None) or {}
            yield f"hqq {meta.get('nbits')}-bit group {meta.get('group_size')}"
        elif isinstance(weight, torch.Tensor):
            yield type(weight).__name__
        elif hasattr(module, "qweight"):
            yield type(module).__name__


def _unpacks_itself(weight: torch.Tensor) -> bool:
    # Every tensor has a `dequantize`: torch's own, for what torch itself quantised.
    return type(weight).dequantize is not torch.Tensor.dequantize


def _is_packed_again(weight: torch.Tensor | None) -> bool:
    """Whether bitsandbytes has packed 4 bits in another order, as it does at a module's first product on a CPU that
    multiplies in bfloat16. The scales are rounded to bfloat16 then, and what unpacks the first order reads noise.
    """
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _is_torchao(weight: torch.Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _product_with_identity(module: nn.Module) -> torch.Tensor:
    """W as what the module makes of an identity matrix, less its bias. Each value is one product with 1: not summed."""
    # Some pack their tensors anew, in place, at their first product. A copy's would break the module itself.
    _product_with_zeros(module)
    # A copy that shares the tensors: without hooks, which may be busy with a batch, and without the bias, beside
    # which W would be rounded.
    bare = copy.copy(module)
    bare._parameters, bare._buffers = dict(module._parameters), dict(module._buffers)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    if getattr(bare, "bias", None) is not None:
        setattr(bare, "bias", None)  # noqa: B010  (of a type that modules do not declare)
    rest = _product_with_zeros(bare)
    columns = []
    width = int(module.in_features)  # type: ignore[arg-type]
    for start in range(0, width, _ROWS):
        x = _zeros(bare, min(_ROWS, width - start))
        x.diagonal(start).fill_(1)
        columns.append(type(bare).forward(bare, x) - rest)
    return torch.cat(columns).T.contiguous()


def _product_with_zeros(module: nn.Module) -> torch.Tensor:
    """(1, out), by the class's forward: an instance's may have been taken over, and may have hooks."""
    y: torch.Tensor = type(module).forward(module, _zeros(module, 1))
    return y


def _zeros(module: nn.Module, rows: int) -> torch.Tensor:
    """(rows, in) of the dtype that a module is given, on its device."""
    own = own_tensors(module)
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    dtype = next((tensor.dtype for tensor in own if tensor.dtype in _PLAIN), getattr(state, "dtype", torch.float16))
    return torch.zeros(rows, int(module.in_features), dtype=dtype, device=own[0].device)  # type: ignore[arg-type]
