"""DEFT, and PaRa: a subspace of the base's outputs is taken away, and another put in its place.

y = (W + Q (s R − Lᵀ W)) x + b with R (r, in) learned, and Q and L (out, r) from the learned P (out, r): for
decomposition_method="relu" Q = P and L = relu(P), for "qr" both are P's orthonormal columns
(peft.tuners.deft.layer.DeftLinear). So A = s R − Lᵀ W and B = Q. s = alpha / r, or 1 without an alpha. PaRa
(para=True) has no R. r is cut to the number of outputs.

Sources: DEFT, NeurIPS 2025; Chen et al. 2024, PaRa (arXiv 2406.05641).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import DeftConfig

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import Option, check_config, flag, is_number, rank
from lorakit.adapters.methods.parts import module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint

_P, _R = "deft_P", "deft_R"
_METHOD = Option("decomposition_method", ("relu", "qr").__contains__, "'relu' or 'qr'", needed=True)


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a DEFT checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    alpha = Option("alpha", is_number, "a number that fp32 can hold")
    options = [rank("r"), _METHOD, alpha, flag("para")]
    check_config(checkpoint, DeftConfig, options, harmless="init_scale deft_dropout init_weights")
    grouped = parts_of(checkpoint, base, "a DEFT", [_P, _R])
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    method = "para" if checkpoint.config.get("para") else "deft"
    return AdapterForm(method, modules, dict(checkpoint.config), grouped.kept, uses_base_weights=True)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor: P (out, r), and R (r, in) but for PaRa.
    """
    config, place = checkpoint.config, linear_at(checkpoint, base, path)
    rows = min(config["r"], place.out_features)
    wanted = {_P: (place.out_features, rows)} | ({} if config.get("para") else {_R: (rows, place.in_features)})
    tensors = tensors_at(checkpoint, path, items, wanted)
    # PEFT takes Q in fp32 from whatever it is given. The signs of its columns matter, so fp32 here too.
    p = tensors[_P].float()
    q, left = (p, torch.relu(p)) if config["decomposition_method"] == "relu" else (torch.linalg.qr(p)[0],) * 2
    a = -(left.T @ base.weight(path).to("cpu", torch.float32))
    if _R in tensors:
        a += (config["alpha"] / rows if config.get("alpha") else 1.0) * tensors[_R].float()
    return module_form(place, a, q)
