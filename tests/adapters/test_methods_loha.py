"""LoHa checkpoints → canonical form."""

import pytest
from peft import LoHaConfig
from peft_folders import save, without
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError


def config_of(targets=("q_proj", "down_proj"), **options):
    return LoHaConfig(**{"target_modules": list(targets), "r": 4, "alpha": 6, "init_weights": False} | options)


@pytest.mark.parametrize(
    ("name", "targets", "options", "rank"),
    [
        ("llama", ["q_proj", "down_proj"], {}, 16),
        ("llama", ["q_proj", "k_proj", "up_proj", "down_proj"], {"r": 7}, 32),
        ("llama", ["q_proj", "down_proj"], {"rank_pattern": {"0.*q_proj": 2}, "alpha_pattern": {"q_proj": 9.5}}, 16),
        ("qwen3", ["v_proj", "o_proj"], {"r": 3}, 9),
        ("bert", ["query", "dense", "classifier"], {"r": 2, "use_effective_conv2d": True}, 4),
        ("t5", ["q", "wi"], {"r": 2}, 4),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, options, rank):
    form = check_exact(tenant_with(config_of(targets, **options), name), tmp_path / "tenant", name)
    assert form.method == "loha" and form.rank == rank and not form.uses_base_weights


def test_patterns_set_the_rank_and_the_scale(tmp_path):
    config = config_of(rank_pattern={"0.*q_proj": 2}, alpha_pattern={"0.*": 1, "q_proj": 10})
    modules = form_of(save(tenant_with(config), tmp_path / "tenant")).modules
    assert [(form.rank, form.scale) for path, form in modules.items() if "q_proj" in path] == [(4, 0.5), (16, 2.5)]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rotates": True}, UnsupportedMethodError, "rotates"),
        ({"r": 0}, CheckpointError, "r of"),
        ({"r": 5}, ShapeMismatchError, "hada_w1_a"),
        ({"alpha": None}, CheckpointError, "alpha"),
        ({"rank_pattern": {"q_proj": "2"}}, CheckpointError, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, CheckpointError, "rank_pattern is no regular"),
        ({"alpha_pattern": [1]}, CheckpointError, "alpha_pattern"),
    ],
    ids=str,
)
def test_options_are_refused(tmp_path, changes, error, match):
    check_refused(save(tenant_with(config_of()), tmp_path / "tenant"), error, match, changes)


def test_damaged_tensors_are_refused(tmp_path):
    check_refused(
        save(tenant_with(config_of()), tmp_path / "tenant"),
        CheckpointError,
        r"1\.self_attn\.q_proj has no hada_w2_b",
        tensors=without("1.self_attn.q_proj.hada_w2_b"),
    )
