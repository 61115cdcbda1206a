"""HRA: the base's weight after a chain of learned reflections of its input.

y = W H₁ H₂ … H_r x + b with Hᵢ = I − 2 uᵢ uᵢᵀ and uᵢ the normed columns of U (peft.tuners.hra.layer.HRALinear). In
compact form H₁ … H_r = I − U T Uᵀ with T (r, r) upper triangular, so A = Uᵀ and B = −W U T. With apply_GS the columns
are made orthonormal first, and PEFT applies I − 2 U Uᵀ: T = 2 I.

Sources: Yuan et al. 2024 (arXiv 2405.17484); Schreiber and Van Loan 1989 for the compact form.
"""

from __future__ import annotations

import torch
from peft import HRAConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm
from lorakit.adapters.methods.linears import linear_at
from lorakit.adapters.methods.options import check_config, check_size, flag, rank
from lorakit.adapters.methods.parts import check_shape, module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError

_ITEM = "hra_u"
_DEPENDENT = 1e-6
"""What is left of a column, as a share of it, when rounding decides its direction."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts an HRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    check_config(checkpoint, HRAConfig, [rank("r"), flag("apply_GS")], harmless="init_weights")
    grouped = parts_of(checkpoint, base, "an HRA", [_ITEM])
    modules = {}
    for path, items in grouped.modules.items():
        place, columns = linear_at(checkpoint, base, path), items[_ITEM]
        what = f"the HRA columns of {path}"
        check_shape(checkpoint.source, what, columns, (place.in_features, checkpoint.config["r"]))
        if checkpoint.config.get("apply_GS"):
            u = _orthonormal(checkpoint, what, columns.double())
            t = 2 * torch.eye(u.shape[1], dtype=u.dtype)
        else:
            u = columns.double() / torch.linalg.vector_norm(columns.double(), dim=0)
            check_size(checkpoint, "r", u.shape[1] ** 2)
            t = _compact(u)
        weight = base.weight(path).to("cpu", torch.float32)
        modules[path] = module_form(place, u.T.float(), -(weight @ (u @ t).float()))
    return AdapterForm("hra", modules, dict(checkpoint.config), grouped.kept, uses_base_weights=True)


def _compact(u: torch.Tensor) -> torch.Tensor:
    """T of H₁ … H_r = I − U T Uᵀ, one reflection more at a time."""
    gram = u.T @ u
    t = torch.zeros_like(gram)
    for i in range(len(gram)):
        t[:i, i] = -2 * t[:i, :i] @ gram[:i, i]
        t[i, i] = 2
    return t


def _orthonormal(checkpoint: Checkpoint, what: str, columns: torch.Tensor) -> torch.Tensor:
    """The columns by Gram and Schmidt, but for signs, which U Uᵀ does not show."""
    q, r = torch.linalg.qr(columns)
    left = r.diagonal().abs() if q.shape == columns.shape else torch.zeros(1)
    if (left <= _DEPENDENT * torch.linalg.vector_norm(columns, dim=0)).any():
        raise CheckpointError(
            f"{checkpoint.source}: {what} are linearly dependent, so that apply_GS has no defined result for them; "
            "train with init_weights=False or without apply_GS."
        )
    return q
