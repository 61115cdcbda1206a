"""LoKr: the Kronecker product of a small matrix and a low-rank one.

y = W x + b + s · (w1 ⊗ w2) x, with s = alpha / r (peft.tuners.lokr.layer.make_kron). Each of w1 and w2 is one matrix
or a product of two; a matrix is a product with the identity on its shorter side. For w1 = l1 r1 and w2 = l2 r2,

    w1 ⊗ w2 = (l1 ⊗ l2) (r1 ⊗ r2)

so B = l1 ⊗ l2 and A = r1 ⊗ r2: its rank is the product of the two ranks. PEFT leaves w2 unfactored where r is at least
half its longer side. The product then mostly has the base weight's own rank, which is no low-rank form: it is refused,
or approximated by SVD where that is asked for.

Sources: Yeh et al. 2023, LyCORIS (arXiv 2309.14859); Edalati et al. 2022, KronA (arXiv 2212.10650).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import (
    ALPHA_PATTERN,
    RANK_PATTERN,
    Option,
    check_config,
    flag,
    is_rank,
    number,
    rank,
)
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.methods.svd import refusal, truncated
from lorakit.adapters.methods.targets import by_pattern
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place

CHOICES = ("svd_energy",)

_FIRST = ("lokr_w1", "lokr_w1_a", "lokr_w1_b")
_SECOND = ("lokr_w2", "lokr_w2_a", "lokr_w2_b")
_FACTOR = Option(
    "decompose_factor",
    lambda value: is_rank(value) or (type(value) is int and value == -1),
    "-1 or a whole number of at least 1",
)


def convert(checkpoint: Checkpoint, base: BaseModel, svd_energy: float | None = None) -> AdapterForm:
    """Converts a LoKr checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(
        checkpoint,
        LoKrConfig,
        [rank("r"), number("alpha"), RANK_PATTERN, ALPHA_PATTERN, flag("decompose_both"), _FACTOR],
        # use_effective_conv2d concerns convolutions alone, which are no places here.
        harmless="init_weights rank_dropout rank_dropout_scale module_dropout use_effective_conv2d",
    )
    grouped = parts_of(checkpoint, base, "a LoKr", (*_FIRST, *_SECOND))
    modules: dict[str, ModuleForm] = {}
    errors: dict[str, float] = {}
    for path, items in grouped.modules.items():
        modules[path], error = _module(checkpoint, base, path, items, svd_energy)
        if error is not None:
            errors[path] = error
    return AdapterForm("lokr", modules, dict(checkpoint.config), grouped.kept, svd_errors=errors)


def _module(
    checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor], svd_energy: float | None
) -> tuple[ModuleForm, float | None]:
    """One module's form, and its error if it is not exact."""
    place = linear_at(checkpoint, base, path)
    r = by_pattern(checkpoint, "rank_pattern", "r", path)
    scale = by_pattern(checkpoint, "alpha_pattern", "alpha", path) / r
    tensors = tensors_at(checkpoint, path, items, _shapes(checkpoint, place, r))
    (l1, r1), (l2, r2) = _factors(tensors, _FIRST), _factors(tensors, _SECOND)
    smaller = min(place.in_features, place.out_features)
    if _SECOND[0] in tensors and l1.shape[1] * l2.shape[1] >= smaller:
        if svd_energy is None:
            raise refusal(
                checkpoint,
                f"the LoKr of {path} has full rank ({smaller}): with r={r} PEFT left its second matrix unfactored. "
                "Train with a smaller r, below half the longer side of that matrix "
                f"({tuple(tensors[_SECOND[0]].shape)})",
            )
        a, b, error = truncated(checkpoint, path, scale * torch.kron(l1 @ r1, l2 @ r2), svd_energy)
        return module_form(place, a, b), error
    return module_form(place, torch.kron(r1, r2).float(), torch.kron(l1, l2).float(), scale), None


def _shapes(checkpoint: Checkpoint, place: Place, r: int) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT makes for a module, as peft.tuners.lokr.layer.LoKrLayer.update_layer decides it."""
    factor = checkpoint.config.get("decompose_factor")
    factor = -1 if factor is None else factor
    rows1, rows2 = factorization(place.out_features, factor)
    columns1, columns2 = factorization(place.in_features, factor)
    shapes: dict[str, tuple[int, ...]] = {}
    for (whole, left, right), (rows, columns), splits in (
        (_FIRST, (rows1, columns1), bool(checkpoint.config.get("decompose_both"))),
        (_SECOND, (rows2, columns2), True),
    ):
        if splits and r < max(rows, columns) / 2:
            shapes |= {left: (rows, r), right: (r, columns)}
        else:
            shapes[whole] = (rows, columns)
    return shapes


def _factors(tensors: Mapping[str, torch.Tensor], names: tuple[str, str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices whose product is w1 or w2, with as few columns between them as can be."""
    whole, left, right = names
    if whole in tensors:
        matrix = tensors[whole]
    elif tensors[left].shape[1] <= min(tensors[left].shape[0], tensors[right].shape[1]):
        return tensors[left], tensors[right]
    else:
        matrix = tensors[left] @ tensors[right]
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)
