"""AdaMSS: low-rank updates, each of one cluster of the outputs, over a common projection of the input.

With V (R, in + 1) of the stored `adamss_newB`, and Aᵢ (rᵢ, R) and Bᵢ of cluster i: y[cluster i] = (W x + b)[cluster i]
+ Bᵢ Aᵢ V [x; 1] (peft.tuners.adamss.layer.Linear). So A stacks the Aᵢ V, but for V's last column, which stands for the
base's bias and gives d; B holds the Bᵢ in the rows of their clusters. Where the base has no bias V has no such column.

Which outputs are in which cluster is not stored: PEFT finds it again from the base's weight, by an SVD of a random
projection with a stored seed and k-means with a fixed one. So does this, by PEFT's own functions; the stored V shows
whether it is the same decomposition.

Source: AdaMSS, NeurIPS 2025 (openreview.net/forum?id=8ZdWmpYxT0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from peft import AdamssConfig
from peft.tuners.adamss.utils import clustering_Z, seg_locations, slice_pca

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods.linears import linear_at
from lorakit.adapters.methods.options import Option, check_config, is_whole, rank
from lorakit.adapters.methods.parts import check_items, check_shape, module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.errors import CheckpointError, MissingDependencyError

_V = "adamss_newB"
_TRAINING = (
    "init_weights subspace_rank use_asa asa_target_subspaces init_warmup final_warmup mask_interval "
    "asa_importance_beta asa_uncertainty_beta asa_schedule_exponent use_dynamic_rank svd_threshold"
)
_KMEANS_ROUNDS = 10
"""As peft.tuners.adamss.layer.AdamssLayer.update_layer has it."""
_SAME = 0.05
"""How far a row of V, of length 1, may be off: rounding to bf16 stays below, another row or sign does not."""


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts an AdaMSS checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    if find_spec("sklearn") is None:
        raise MissingDependencyError(
            f"{checkpoint.source}: AdaMSS finds its clusters with scikit-learn, which is not installed; "
            "pip install scikit-learn."
        )
    seed = Option("random_seed", is_whole, "a whole number of at most 31 bits")
    check_config(checkpoint, AdamssConfig, [rank("r"), rank("num_subspaces"), seed], harmless=_TRAINING)
    numbered = {match[0] for key in checkpoint.tensors if (match := re.search(r"adamss_[AB]\.\d+$", key))}
    grouped = parts_of(checkpoint, base, "an AdaMSS", [_V, *sorted(numbered)])
    modules = {path: _module(checkpoint, base, path, items) for path, items in grouped.modules.items()}
    return AdapterForm("adamss", modules, dict(checkpoint.config), grouped.kept, uses_base_weights=True)


def _module(checkpoint: Checkpoint, base: BaseModel, path: str, items: Mapping[str, torch.Tensor]) -> ModuleForm:
    """One module's form.

    Args:
        checkpoint: the whole checkpoint.
        base: the base model.
        path: the module's path.
        items: the end of the key → tensor: V (R, in + 1, or in), and Aᵢ (rᵢ, R) and Bᵢ (cluster, rᵢ) by their number.
    """
    source, place = checkpoint.source, linear_at(checkpoint, base, path)
    count = min(checkpoint.config["num_subspaces"], place.out_features)
    check_items(checkpoint, path, items, [_V, *(f"adamss_{letter}.{i}" for letter in "AB" for i in range(count))])
    v, clusters = _decomposition(checkpoint, base, path, count)
    check_shape(source, f"{_V} of {path}", items[_V], tuple(v.shape))
    if (torch.linalg.vector_norm(items[_V].float() - v, dim=1) > _SAME).any():
        raise CheckpointError(
            f"{source}: {_V} of {path} is not what PEFT would make of this base here, and so the outputs that each "
            "subspace belongs to are unknown; it was trained on another base, device or version."
        )
    v, ups, downs = items[_V].double(), [], []
    for i, rows in enumerate(clusters):
        down, up = items[f"adamss_A.{i}"].double(), items[f"adamss_B.{i}"].double()
        r = max(1, down.shape[0] if down.dim() else 0)
        check_shape(source, f"adamss_A.{i} of {path}", down, (r, len(v)))
        check_shape(source, f"adamss_B.{i} of {path}", up, (len(rows), r))
        downs.append(down @ v)
        ups.append(torch.zeros(place.out_features, r, dtype=v.dtype).index_copy(0, rows, up))
    a, b = torch.cat(downs), torch.cat(ups, dim=1)
    d = b @ a[:, -1] if v.shape[1] > place.in_features else None
    return module_form(place, a[:, : place.in_features].float(), b.float(), d=d)


def _decomposition(
    checkpoint: Checkpoint, base: BaseModel, path: str, count: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """V as PEFT would make it, and the outputs of each cluster."""
    config, weight, bias = checkpoint.config, base.weight(path), base.bias(path)
    if bias is not None:
        weight = torch.cat((weight, bias.to(weight.device)[:, None]), dim=1)
    seed = config.get("random_seed") or 0
    v, u = slice_pca(weight.float()[None, None], config["r"], weight.device, torch.float32, random_seed=seed)
    index, _ = clustering_Z(u[0, 0], count, _KMEANS_ROUNDS)
    clusters = seg_locations(index)
    if len(clusters) != count:
        raise CheckpointError(f"{checkpoint.source}: {path} has fewer than {count} clusters; lower num_subspaces.")
    return v[0, 0].cpu(), [clusters[i] for i in range(count)]
