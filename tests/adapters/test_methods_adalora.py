"""AdaLoRA checkpoints → canonical form."""

import pytest
import torch
from architectures import ARCHITECTURES
from peft import AdaLoraConfig
from peft_folders import edit_config, save, without
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit.errors import CheckpointError, ModuleNotFoundInBaseError, ShapeMismatchError, UnsupportedMethodError


def config_of(targets=("q_proj", "down_proj"), **options):
    return AdaLoraConfig(**{"target_modules": list(targets), "total_step": 10, "init_r": 6} | options)


def pruned(alpha=5):
    """An adapter whose modules PEFT's own allocator has pruned, some to nothing."""
    tenant = tenant_with(config_of(target_r=2, tinit=1, tfinal=5, lora_alpha=alpha))
    inputs = ARCHITECTURES["llama"].inputs(2)
    for step in range(6):
        tenant(**inputs, labels=inputs["input_ids"]).loss.backward()
        tenant.base_model.update_and_allocate(step)
        tenant.zero_grad()
    pattern = tenant.peft_config["default"].rank_pattern
    first = next(name for name in pattern if "q_proj" in name)
    pattern[first] = [False] * 6
    tenant.base_model.rankallocator.mask_using_rank_pattern(tenant.base_model.model, pattern)
    return tenant


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], {"lora_alpha": 5}),
        ("llama", ["q_proj", "down_proj"], {"lora_alpha": 0}),
        ("llama", ["q_proj", "down_proj"], {"r": 3, "use_rslora": True, "lora_bias": True, "alpha_pattern": {"q": 9}}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        ("bert", ["query", "dense"], {}),
        ("t5", ["q", "wo"], {}),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, options):
    form = check_exact(tenant_with(config_of(targets, **options), name), tmp_path / "tenant", name)
    assert form.method == "adalora" and form.rank == 6 and not form.uses_base_weights


def test_pruned_ranks_equal_peft(tmp_path):
    form = check_exact(pruned(), tmp_path / "tenant")
    ranks = {module.rank for module in form.modules.values()}
    assert len(ranks) > 1 and max(ranks) < 6
    empty = next(module for path, module in form.modules.items() if "q_proj" in path)
    assert empty.rank == 1 and not empty.a.any() and not empty.b.any()


def test_a_scale_that_loading_changes_is_refused(tmp_path):
    folder = save(pruned(alpha=0), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match="lora_alpha=0"):
        form_of(folder)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"use_qalora": True}, UnsupportedMethodError, "use_qalora"),
        ({"target_parameters": ["x"]}, UnsupportedMethodError, "target_parameters"),
        ({"init_lora_weights": "pissa"}, UnsupportedMethodError, "pissa"),
        ({"rotates": True}, UnsupportedMethodError, "rotates"),
        ({"init_r": "6"}, CheckpointError, "init_r"),
        ({"init_r": 7}, ShapeMismatchError, "lora_A"),
        ({"lora_alpha": 10**400}, CheckpointError, "lora_alpha"),
        ({"total_step": None}, CheckpointError, "total_step"),
        ({"rank_pattern": {"x": [1]}}, CheckpointError, "rank_pattern"),
        ({"rank_pattern": {"x.lora_E": [True] * 6}}, CheckpointError, "x.lora_E"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, CheckpointError, "6 rows"),
    ],
    ids=str,
)
def test_options_are_refused(tmp_path, changes, error, match):
    check_refused(save(tenant_with(config_of()), tmp_path / "tenant"), error, match, changes)


def test_damaged_tensors_are_refused(tmp_path):
    folder = save(tenant_with(config_of()), tmp_path / "tenant")
    check_refused(
        folder, CheckpointError, r"1\.self_attn\.q_proj has no lora_E", tensors=without("1.self_attn.q_proj.lora_E")
    )
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_E"
    check_refused(
        folder,
        ShapeMismatchError,
        r"lora_E of .*1\.self_attn\.q_proj",
        tensors=lambda tensors: tensors.update({key: torch.ones(6)}),
    )
    with pytest.raises(ModuleNotFoundInBaseError):
        form_of(folder, "gpt2")


def test_an_embedding_is_refused(tmp_path):
    folder = save(tenant_with(config_of(["lm_head"])), tmp_path / "tenant")
    edit_config(folder, target_modules=["embed_tokens"])

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("lm_head", "model.embed_tokens")] = torch.clone(tensors.pop(key))

    check_refused(folder, ShapeMismatchError, "embedding", tensors=rename)
