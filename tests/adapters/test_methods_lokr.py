"""LoKr checkpoints → canonical form."""

import pytest
import torch
from peft import LoKrConfig
from peft_folders import key_of, save
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


def config_of(targets=("q_proj", "down_proj"), **options):
    return LoKrConfig(**{"target_modules": list(targets), "r": 2, "alpha": 6, "init_weights": False} | options)


@pytest.mark.parametrize(
    ("name", "targets", "options", "rank"),
    [
        ("llama", ["q_proj", "down_proj"], {}, 8),
        ("llama", ["q_proj", "k_proj", "up_proj", "down_proj"], {"r": 1}, 4),
        # w1, of (8, 8), is a product too.
        ("llama", ["q_proj", "down_proj"], {"decompose_both": True, "decompose_factor": 8, "r": 1}, 1),
        ("llama", ["q_proj", "down_proj"], {"decompose_both": True, "decompose_factor": 8, "r": 3}, 12),
        # w1 (1, 32) and w2 (101, 1) are products of more terms than their shorter sides.
        ("llama", ["lm_head"], {"decompose_both": True, "decompose_factor": 32}, 1),
        # w2 (101, 8) is unfactored, and w1 (1, 4), but the product has a low rank.
        ("llama", ["lm_head"], {"r": 60}, 8),
        ("llama", ["q_proj"], {"decompose_factor": 4, "r": 3}, 12),
        ("llama", ["q_proj", "down_proj"], {"rank_pattern": {"0.*q_proj": 1}, "alpha_pattern": {"q_proj": 9.5}}, 8),
        ("qwen3", ["v_proj", "o_proj"], {"init_weights": "lycoris"}, 8),
        ("bert", ["query", "dense"], {"use_effective_conv2d": True}, 8),
        ("t5", ["q", "wi"], {}, 8),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, options, rank):
    form = check_exact(tenant_with(config_of(targets, **options), name), tmp_path / "tenant", name)
    assert form.method == "lokr" and form.rank == rank and not form.uses_base_weights


def test_an_unfactored_second_matrix_of_full_rank_is_refused(tmp_path):
    folder = save(tenant_with(config_of(r=8)), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match=r"has full rank \(32\).*unfactored"):
        form_of(folder)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rotates": True}, UnsupportedMethodError, "rotates"),
        ({"r": 2.0}, CheckpointError, "r of"),
        ({"r": 8}, CheckpointError, "no lokr_w2;"),
        ({"r": 1}, ShapeMismatchError, "lokr_w2_a"),
        ({"decompose_factor": 2}, ShapeMismatchError, "lokr_w1"),
        ({"decompose_factor": 0}, CheckpointError, "decompose_factor"),
        ({"decompose_factor": True}, CheckpointError, "decompose_factor"),
        ({"decompose_both": 1}, CheckpointError, "decompose_both"),
        ({"decompose_both": True, "decompose_factor": 8}, CheckpointError, "no lokr_w1_a"),
        ({"alpha_pattern": {"q_proj": []}}, CheckpointError, "alpha_pattern"),
    ],
    ids=str,
)
def test_options_are_refused(tmp_path, changes, error, match):
    check_refused(save(tenant_with(config_of()), tmp_path / "tenant"), error, match, changes)


def test_a_tensor_without_use_is_refused(tmp_path):
    check_refused(
        save(tenant_with(config_of()), tmp_path / "tenant"),
        CheckpointError,
        "has a lokr_w2, which",
        tensors=lambda t: t.update({key_of(t, "q_proj.lokr_w1").replace("_w1", "_w2"): torch.ones(8, 8)}),
    )
