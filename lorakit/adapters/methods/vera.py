"""VeRA: one frozen random A and B for all modules, and two trained vectors a module.

y = W x + b + λ_b ⊙ (B_s (λ_d ⊙ (A_s x))) (peft.tuners.vera.layer.Linear), so A = diag(λ_d) A_s and B = diag(λ_b) B_s,
where A_s and B_s are as many columns and rows of the shared matrices as the module has inputs and outputs. These are in
the checkpoint (save_projection), or drawn again from projection_prng_key as peft.VeraModel draws them.

PVeRA (pvera.py) has the same form at inference, so what both do is here.

Source: Kopiczko et al. 2023 (arXiv 2310.11454).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig, VeraConfig
from torch.nn.init import kaiming_uniform_

from lorakit.adapters.base import BaseModel
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.methods import seeded
from lorakit.adapters.methods.linears import linear_at, tensors_at
from lorakit.adapters.methods.options import check_config, check_size, flag, rank
from lorakit.adapters.methods.parts import check_shape, module_form, parts_of
from lorakit.adapters.peft_reader import Checkpoint
from lorakit.adapters.places import Place


@dataclass(frozen=True)
class Kind:
    """What VeRA and its kin differ in.

    Attributes:
        name: as messages say it, with its article.
        prefix: of its keys and its dropout's option.
        config: PEFT's class.
        parts: how many times r rows A_s and λ_d have; the form takes the first r.
        harmless: options of its own that do not change what it computes.
        refused: options that do, and why they are not served.
    """

    name: str
    prefix: str
    config: type[PeftConfig]
    parts: int
    harmless: str
    refused: Mapping[str, str]

    def rows(self, checkpoint: Checkpoint) -> int:
        """Of A_s, and the length of λ_d."""
        return self.parts * int(checkpoint.config["r"])


_VERA = Kind("a VeRA", "vera", VeraConfig, 1, "", {})


def convert(checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a VeRA checkpoint; see `lorakit.adapters.methods.convert` for the errors."""
    return convert_as(_VERA, checkpoint, base)


def convert_as(kind: Kind, checkpoint: Checkpoint, base: BaseModel) -> AdapterForm:
    """Converts a checkpoint of VeRA's kin."""
    config, prefix = checkpoint.config, kind.prefix
    check_config(
        checkpoint,
        kind.config,
        [rank("r"), flag("save_projection"), seeded.seed("projection_prng_key")],
        harmless=f"d_initial init_weights {prefix}_dropout {kind.harmless}",
        refused=kind.refused,
    )
    items = (f"{prefix}_lambda_b", f"{prefix}_lambda_d")
    shared = (f"base_model.{prefix}_A", f"base_model.{prefix}_B")
    grouped = parts_of(checkpoint, base, kind.name, items, shared)
    places = {path: linear_at(checkpoint, base, path) for path in base.places if path in grouped.modules}
    # Before anything of these sizes is made.
    vectors = {
        path: tensors_at(
            checkpoint,
            path,
            grouped.modules[path],
            dict(zip(items, ((place.out_features,), (kind.rows(checkpoint),)), strict=True)),
        )
        for path, place in places.items()
    }
    saved = bool(config.get("save_projection", True))
    for key in shared:
        seeded.check_saved(checkpoint, "save_projection", saved, f"the shared matrices ({key})", key in grouped.shared)
    widths = max(place.in_features for place in places.values()), max(place.out_features for place in places.values())
    if saved:
        a, b = (grouped.shared[key] for key in shared)
        check_shape(checkpoint.source, shared[0], a, (kind.rows(checkpoint), widths[0]))
        check_shape(checkpoint.source, shared[1], b, (widths[1], config["r"]))
    else:
        a, b = _drawn(kind, checkpoint, base, places, widths)
    a, b = a[: config["r"]].double(), b.double()

    def form(path: str, place: Place) -> ModuleForm:
        scale_b, scale_d = (vectors[path][item][:, None] for item in items)
        return module_form(
            place,
            (scale_d[: config["r"]] * a[:, : place.in_features]).float(),
            (scale_b * b[: place.out_features]).float(),
        )

    modules = {path: form(path, place) for path, place in places.items()}
    return AdapterForm(prefix, modules, dict(config), grouped.kept, uses_base_weights=not saved)


def _drawn(
    kind: Kind, checkpoint: Checkpoint, base: BaseModel, places: Mapping[str, Place], widths: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_s and B_s as PEFT draws them: both from one generator, A_s first."""
    check_size(checkpoint, "r", kind.rows(checkpoint) * widths[0] + widths[1] * checkpoint.config["r"])
    generator = torch.Generator().manual_seed(checkpoint.config["projection_prng_key"])
    a = kaiming_uniform_(torch.empty(kind.rows(checkpoint), widths[0]), generator=generator)
    b = kaiming_uniform_(torch.empty(widths[1], checkpoint.config["r"]), generator=generator)
    for path in places:  # every module rounds the one pair
        a, b = (seeded.rounded(checkpoint, base, path, tensor) for tensor in (a, b))
    return a, b
