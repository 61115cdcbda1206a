"""DeLoRA checkpoints → canonical form."""

import pytest
import torch
from peft import DeloraConfig
from peft_folders import save, without
from tenants import check_exact, check_refused, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


def config_of(targets=("q_proj", "down_proj"), **options):
    return DeloraConfig(**{"target_modules": list(targets), "r": 4, "delora_lambda": 3} | options)


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], {}),
        ("llama", ["q_proj", "down_proj"], {"rank_pattern": {"q_proj": 2}, "lambda_pattern": {"down_proj": 7}}),
        ("qwen3", ["k_proj", "o_proj"], {"init_weights": False, "module_dropout": 0.1}),
        ("bert", ["query", "dense", "classifier"], {}),
        ("t5", ["q", "wi"], {}),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, options):
    form = check_exact(tenant_with(config_of(targets, **options), name), tmp_path / "tenant", name)
    assert form.method == "delora" and form.rank == 4 and not form.uses_base_weights


def test_vanishing_terms_equal_peft(tmp_path):
    """Norms below PEFT's smallest, zero among them, are taken for it."""
    tenant = tenant_with(config_of())
    with torch.no_grad():
        for name, parameter in tenant.named_parameters():
            if "delora_A" in name:
                parameter[0] *= 1e-6
                parameter[1] = 0
            elif "delora_B" in name:
                parameter[:, 2] = 0
    check_exact(tenant, tmp_path / "tenant")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rotates": True}, UnsupportedMethodError, "rotates"),
        ({"r": -1}, CheckpointError, "r of"),
        ({"r": 5}, ShapeMismatchError, "delora_A"),
        ({"rank_pattern": {"q_proj": 5}}, ShapeMismatchError, r"delora_A of .*q_proj"),
        ({"rank_pattern": {"*": 5}}, CheckpointError, "no regular expression"),
    ],
    ids=str,
)
def test_options_are_refused(tmp_path, changes, error, match):
    check_refused(save(tenant_with(config_of()), tmp_path / "tenant"), error, match, changes)


def test_missing_norms_are_refused(tmp_path):
    check_refused(
        save(tenant_with(config_of()), tmp_path / "tenant"),
        CheckpointError,
        r"1\.self_attn\.q_proj has no delora_w_norm",
        tensors=without("1.self_attn.q_proj.delora_w_norm"),
    )
