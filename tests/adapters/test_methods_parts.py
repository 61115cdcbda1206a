"""What every family keeps of a checkpoint."""

import pytest
import torch
from peft_folders import base_of, edit_tensors, save
from safetensors.torch import load_file
from tenants import SMALL, WEIGHTS, each_family, tenant_with

import lorakit
from lorakit.errors import CheckpointError

_COPIES = {f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}


@pytest.mark.filterwarnings("ignore")
@each_family("LN_TUNING", "TRAINABLE_TOKENS")
def test_copies_of_the_base_are_not_kept_and_changed_ones_refused(tmp_path, method):
    """PEFT gives the same adapter without them, and they are large: a vocabulary's embeddings."""
    tenant = tenant_with(SMALL[method](target_modules=["q_proj"]))
    stored = load_file(save(tenant, tmp_path / "plain") / WEIGHTS)
    folder = save(tenant, tmp_path / "tenant", save_embedding_layers=True)
    assert load_file(folder / WEIGHTS).keys() - stored.keys() == _COPIES
    bank = lorakit.export([folder], tmp_path / "bank", base_model=base_of())
    given = load_file(bank.export_peft("tenant", tmp_path / "back") / WEIGHTS)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)

    edit_tensors(folder, lambda tensors: tensors["base_model.model.lm_head.weight"][3, 3].add_(0.01))
    with pytest.raises(CheckpointError, match="'lm_head.weight' is not part of .* no copy of the base's weight"):
        lorakit.export([folder], tmp_path / "other", base_model=base_of())
