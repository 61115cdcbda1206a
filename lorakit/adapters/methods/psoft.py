"""PSOFT: a learned rotation inside the base's principal subspace.

y = W x + b + s · B₀ (R − I) A₀ x (peft.tuners.psoft.layer.Linear). R (r, r) is learned: free, or orthogonal by Cayley's
transform, and scaled on both sides. A₀ and B₀ are the r largest singular triplets of W and are not stored, so that PEFT
takes them from the base again when it loads: A = A₀ and B = B₀ (R − I).

The signs of singular vectors are the linear algebra library's choice, and R is learned for one choice. So the
decomposition is made here as PEFT makes it, by its own function, on the device that the base's weight is on. As with
PEFT itself, what was trained over a decomposition made elsewhere, by a library that chooses otherwise, is another
adapter here.

Source: PSOFT, ICLR 2026 (openreview.net/forum?id=FSHrinMArK).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PsoftConfig
from peft.tuners.psoft.layer import OrthLayer, PsoftLayer

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import Option, check_config, is_flag, is_number, is_whole, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import ShapeMismatchError

_FLAGS = ("psoft_orth", "psoft_mag_a", "psoft_mag_b", "use_cayley_neumann")
_ROUNDS = 1000
"""More than any training uses; the numbers of rounds come from a file."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a PSOFT checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    # Needed where the file could be an older PEFT's, which drew without a seed.
    seeded = checkpoint.config.get("psoft_svd") == "lowrank"
    options = [
        rank("r"),
        Option("psoft_alpha", lambda value: is_number(value) and value > 0, "a number above 0", needed=True),
        *(Option(name, is_flag, "true or false", needed=True) for name in _FLAGS),
        _rounds("num_cayley_neumann_terms"),
        _rounds("psoft_svd_lowrank_niter"),
        Option("cayley_neumann_eps", is_number, "a number that fp32 can hold"),
        Option("ab_svd_init", ("psoft_init", "pissa_init").__contains__, "'psoft_init' or 'pissa_init'", needed=True),
        Option("psoft_svd", ("full", "lowrank").__contains__, "'full' or 'lowrank'", needed=True),
        Option("random_seed", is_whole, "a whole number of at most 31 bits", needed=seeded),
    ]
    check_config(checkpoint, PsoftConfig, options, harmless="psoft_dropout init_weights")
    endings = [f"psoft_R.{name}" for name in ("weight", "vector_a", "vector_b")]
    grouped = parts_of(checkpoint, base, "a PSOFT", endings)
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    return AdapterForm("psoft", modules, dict(checkpoint.config), grouped.kept, uses_base_weights=True)


def _rounds(name: str) -> Option:
    wanted = f"a whole number of at most {_ROUNDS}"
    return Option(name, lambda value: is_whole(value) and value <= _ROUNDS, wanted, needed=True)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor: R's parameters, and its scales (r,) where there are any.
    """
    config, place = checkpoint.config, linear_at(checkpoint, base, path)
    r, most = config["r"], min(place.in_features, place.out_features)
    if r > most:
        raise ShapeMismatchError(
            f"{checkpoint.source}: r is {r}, but the weight of {path} has a rank of at most {most}."
        )
    shapes: dict[str, tuple[int, ...]] = {
        "psoft_R.weight": (r * (r - 1) // 2,) if config["psoft_orth"] else (r, r),
    }
    shapes |= {f"psoft_R.vector_{side}": (r,) for side in "ab" if config[f"psoft_mag_{side}"]}
    turn = _rotation(config, tensors_at(checkpoint, path, items, shapes))
    # None stands for the layer: the function is a method that reads nothing of it.
    left, singular, right = PsoftLayer._compute_svd_factors(
        None,
        base.weight(path).to(torch.float32),
        r,
        svd_mode=config["psoft_svd"],
        niter=config["psoft_svd_lowrank_niter"],
        random_seed=config.get("random_seed") or 0,
    )
    left, singular, right = (tensor.to("cpu", torch.float64) for tensor in (left, singular, right))
    # PEFT divides the singular values by s and multiplies by it again. What that leaves:
    if config["ab_svd_init"] == "pissa_init":
        root = torch.sqrt(singular)
        left, right = left * root, root[:, None] * right
    else:
        left = left * singular
    return module_form(place, right.float(), (left @ (turn - torch.eye(r, dtype=turn.dtype))).float())


def _rotation(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """R by PEFT's own layer, in fp64 as its tensors are."""
    layer = OrthLayer(
        config["r"],
        orth=config["psoft_orth"],
        mag_b=config["psoft_mag_b"],
        mag_a=config["psoft_mag_a"],
        use_cayley_neumann=config["use_cayley_neumann"],
        num_cayley_neumann_terms=config["num_cayley_neumann_terms"],
        cayley_neumann_eps=config.get("cayley_neumann_eps"),
    ).double()
    layer.load_state_dict({item.removeprefix("psoft_R."): tensor for item, tensor in tensors.items()})
    with torch.no_grad():
        return layer.get_matrix()
