"""MiSS checkpoints → canonical form."""

import pytest
from peft import MissConfig
from peft_folders import save, without
from tenants import check_exact, check_refused, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


def config_of(targets=("q_proj", "down_proj"), **options):
    return MissConfig(**{"target_modules": list(targets), "r": 4} | options)


@pytest.mark.parametrize(
    ("name", "targets", "options", "rank"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], {}, 4),
        # 5 divides neither 32 nor 48 inputs: the last part is filled up.
        ("llama", ["q_proj", "down_proj"], {"r": 5, "init_weights": False}, 5),
        ("llama", ["q_proj", "up_proj"], {"init_weights": "mini", "mini_r": 8}, 4),
        ("llama", ["q_proj", "up_proj"], {"init_weights": "mini", "mini_r": 1, "r": 7}, 7),
        ("qwen3", ["k_proj", "o_proj"], {"mini_r": 3}, 4),
        ("bert", ["query", "dense", "classifier"], {"miss_dropout": 0.1}, 4),
        ("t5", ["q", "wi"], {"r": 32}, 32),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, options, rank):
    form = check_exact(tenant_with(config_of(targets, **options), name), tmp_path / "tenant", name)
    assert form.method == "miss" and form.rank == rank and not form.uses_base_weights


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"init_weights": "bat"}, UnsupportedMethodError, "'bat'.*full rank"),
        ({"init_weights": "bee"}, UnsupportedMethodError, "'bee'"),
        ({"init_weights": ["mini"]}, UnsupportedMethodError, "init_weights"),
        ({"init_weights": "mini", "mini_r": 8}, ShapeMismatchError, "miss_block"),
        ({"init_weights": "mini", "mini_r": 3}, CheckpointError, "mini_r=3 does not divide"),
        ({"init_weights": "mini", "mini_r": None}, CheckpointError, "mini_r"),
        ({"rotates": True}, UnsupportedMethodError, "rotates"),
        ({"r": None}, CheckpointError, "r of"),
        ({"r": 3}, ShapeMismatchError, "miss_block"),
        ({"r": 1 << 30}, ShapeMismatchError, "more than the 48 inputs"),
    ],
    ids=str,
)
def test_options_are_refused(tmp_path, changes, error, match):
    check_refused(save(tenant_with(config_of()), tmp_path / "tenant"), error, match, changes)


def test_a_missing_module_is_refused(tmp_path):
    check_refused(
        save(tenant_with(config_of()), tmp_path / "tenant"),
        CheckpointError,
        r"1\.self_attn\.q_proj",
        tensors=without("1.self_attn.q_proj"),
    )
