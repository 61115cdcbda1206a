"""GraLoRA checkpoints → canonical form."""

import pytest
from peft import GraloraConfig
from peft_folders import save, without
from tenants import check_exact, check_refused, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


def config_of(targets=("q_proj", "down_proj"), **options):
    return GraloraConfig(**{"target_modules": list(targets), "r": 4, "alpha": 6, "gralora_k": 2} | options)


@pytest.mark.parametrize(
    ("name", "targets", "options", "rank"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], {}, 8),
        ("llama", ["q_proj", "up_proj"], {"hybrid_r": 3}, 11),
        ("llama", ["q_proj", "down_proj"], {"gralora_k": 1, "init_weights": False}, 4),
        # k · r exceeds the modules' smaller side.
        ("llama", ["q_proj", "k_proj", "up_proj", "down_proj"], {"gralora_k": 4, "r": 12, "hybrid_r": 2}, 32),
        ("gpt2", ["c_attn", "c_fc"], {"hybrid_r": 1}, 9),
        ("bert", ["query", "dense"], {"gralora_k": 4, "gralora_dropout": 0.1}, 16),
        ("t5", ["q", "wi"], {"r": 6}, 12),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, options, rank):
    form = check_exact(tenant_with(config_of(targets, **options), name), tmp_path / "tenant", name)
    assert form.method == "gralora" and form.rank == rank and not form.uses_base_weights


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rotates": True}, UnsupportedMethodError, "rotates"),
        ({"r": 5}, CheckpointError, "divisible by gralora_k"),
        ({"r": 6}, ShapeMismatchError, "gralora_A"),
        ({"gralora_k": 0}, CheckpointError, "gralora_k"),
        ({"gralora_k": 4}, ShapeMismatchError, "gralora_A"),
        ({"gralora_k": 3, "r": 3}, ShapeMismatchError, "gralora_k=3 does not divide"),
        ({"hybrid_r": -1}, CheckpointError, "hybrid_r"),
        ({"hybrid_r": 0}, CheckpointError, "has a gralora_A_general.weight"),
        ({"alpha": "6"}, CheckpointError, "alpha"),
    ],
    ids=str,
)
def test_options_are_refused(tmp_path, changes, error, match):
    check_refused(save(tenant_with(config_of(hybrid_r=2)), tmp_path / "tenant"), error, match, changes)


def test_a_missing_tensor_is_refused(tmp_path):
    check_refused(
        save(tenant_with(config_of(hybrid_r=2)), tmp_path / "tenant"),
        CheckpointError,
        r"1\.self_attn\.q_proj has no gralora_B_general",
        tensors=without("1.self_attn.q_proj.gralora_B_general"),
    )
