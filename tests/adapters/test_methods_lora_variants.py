"""LoRA's variants that change the base's weights or pack their factors → canonical form.

The reference is what a user has: PEFT's checkpoint, loaded by PEFT over the original base.
"""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from peft import BdLoraConfig, KasaConfig, LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from peft_folders import base_of, edit_config, edit_tensors, key_of, relative, replacing, save, without
from tenants import check_exact, check_refused, form_of, tenant_with

from lorakit import MultiLoraModel
from lorakit.adapters.base import BaseModel
from lorakit.adapters.convert import convert
from lorakit.errors import CheckpointError, ShapeMismatchError, UnsupportedMethodError

LINEAR = ["q_proj", "down_proj"]
SPLIT = {"target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "up_proj"], "nblocks": 2}


def config_of(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LINEAR, **options})


@torch.no_grad()
def check_reloaded(config, folder, name="llama", spread=0.2):
    """Equal to PEFT's in fp64, both before it is saved and when PEFT loads it over the original base."""
    form = check_exact(tenant_with(config, name, spread=spread), folder, name)
    model = MultiLoraModel(copy.deepcopy(base_of(name)))
    model.load_adapter("tenant", folder)
    inputs = ARCHITECTURES[name].inputs(2)
    reference = PeftModel.from_pretrained(copy.deepcopy(base_of(name)), folder).double()(**inputs).logits
    assert relative(model(**inputs, adapter_ids="tenant").logits, reference) <= 2e-5
    return form


# PiSSA and OLoRA


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "r": 8}),
        ("llama", {"use_dora": True}),
        ("llama", {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}}),
        ("llama", {"target_modules": "all-linear", "r": 16}),
        ("llama", {"r": 32}),
        ("llama", {"target_modules": ["lm_head"]}),
        ("bert", {"target_modules": ["query", "dense"]}),
        ("t5", {"target_modules": ["q", "wo"]}),
        ("gpt2", {"target_modules": ["attn.c_proj"]}),
    ],
    ids=str,
)
def test_what_was_taken_from_the_base_is_given_back(tmp_path, init, name, options):
    form = check_reloaded(config_of(init_lora_weights=init, **options), tmp_path / "tenant", name)
    assert form.method == init and form.uses_base_weights
    assert form.rank == 2 * max(options.get("r", 4), *options.get("rank_pattern", {"": 0}).values())


def test_a_conv1d_that_is_not_square(tmp_path):
    config = config_of(init_lora_weights="pissa", target_modules=["c_attn", "c_fc"])
    check_reloaded(config, tmp_path / "tenant", "gpt2")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_first_factors_are_pefts(init):
    tenant = tenant_with(config_of(init_lora_weights=init), spread=0.0)
    for module in form_of(tenant).modules.values():
        # Nothing is trained yet, so what is left of the sum is exactly nothing.
        assert not (module.a[4:].any() or module.b[:, :4].any())


def test_olora_is_known_in_any_case(tmp_path):
    check_reloaded(config_of(init_lora_weights="OLoRA"), tmp_path / "tenant")


def test_a_short_training_survives_16_bits(tmp_path):
    """Its change of W is what is rounded, not what it had taken from W."""
    config = config_of(init_lora_weights="pissa", target_modules=["q_proj"])
    folder = save(tenant_with(config, spread=1e-3), tmp_path / "tenant")
    base = BaseModel.of(base_of())
    exact, rounded = convert("tenant", folder, base), convert("tenant", folder, base, torch.bfloat16)
    for path, module in exact.modules.items():
        other = rounded.modules[path]
        assert relative(other.b.float() @ other.a.float(), module.b @ module.a) < 1e-2


def test_factors_are_fp32_over_a_base_in_16_bits(tmp_path):
    folder = save(tenant_with(config_of(init_lora_weights="pissa")), tmp_path / "tenant")
    form = convert("tenant", folder, BaseModel.of(base_of("llama", torch.bfloat16)))
    assert {module.a.dtype for module in form.modules.values()} == {torch.float32}


@pytest.mark.parametrize(
    "changes", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": {}}]
)
def test_modules_where_peft_would_change_more_than_their_weight(tmp_path, changes):
    config = config_of(target_modules=["lm_head"])
    folder = save(tenant_with(config, "llama-tied"), tmp_path / "tenant")
    edit_config(folder, **changes)
    if "kasa_config" in changes:
        edit_tensors(folder, lambda t: t.update({key_of(t, "lora_A")[:-13] + "lora_diag": torch.ones(4)}))
    with pytest.raises(UnsupportedMethodError, match=r"lm_head, and with it the embedding that is tied to it"):
        form_of(folder, "llama-tied")


@pytest.mark.parametrize("changes", [{"init_lora_weights": "pissa"}, {"use_bdlora": {"match_strict": False}}])
def test_embeddings_are_not_for_them(tmp_path, changes):
    check_refused(
        save(tenant_with(config_of(target_modules=["embed_tokens"])), tmp_path / "tenant"),
        UnsupportedMethodError,
        r"tenant: PEFT has no (PiSSA|use_bdlora) for model.embed_tokens",
        changes,
    )


def test_a_quantised_base_is_refused(tmp_path, monkeypatch):
    folder = save(tenant_with(config_of(init_lora_weights="olora")), tmp_path / "tenant")
    monkeypatch.setattr(BaseModel, "stored", lambda self, name: None)
    with pytest.raises(UnsupportedMethodError, match="OLoRA changes the base's weight of .* quantises it again"):
        form_of(folder)


@pytest.mark.parametrize("alpha", [0, -2])
def test_pissa_has_a_root_of_alpha(tmp_path, alpha):
    check_refused(
        save(tenant_with(config_of(init_lora_weights="pissa")), tmp_path / "tenant"),
        CheckpointError,
        "lora_alpha, which must be above 0",
        {"lora_alpha": alpha},
    )


def test_a_rank_that_the_weight_has_not(tmp_path):
    check_refused(
        save(tenant_with(config_of(r=33)), tmp_path / "tenant"),
        CheckpointError,
        "OLoRA cannot take 33 directions",
        {"init_lora_weights": "olora"},
    )


# KaSA


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "r": 31}),
        ("llama", {"lora_bias": True, "rank_pattern": {"q_proj": 7}, "target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"init_lora_weights": "orthogonal"}),
        ("bert", {"target_modules": ["query", "dense"]}),
        ("t5", {"target_modules": ["q", "wo"]}),
    ],
    ids=str,
)
def test_kasa(tmp_path, name, options):
    form = check_reloaded(config_of(kasa_config=KasaConfig(), **options), tmp_path / "tenant", name)
    assert form.method == "kasa" and form.uses_base_weights
    assert {module.scale for module in form.modules.values()} == {1.0}


@pytest.fixture
def kasa_folder(tmp_path):
    return save(tenant_with(config_of(kasa_config=KasaConfig())), tmp_path / "tenant")


def test_a_kasa_of_defaults_is_one_still(kasa_folder):
    edit_config(kasa_folder, kasa_config={})
    assert form_of(kasa_folder).method == "kasa"


def test_kasa_without_its_diagonal_and_a_diagonal_without_kasa(kasa_folder):
    check_refused(kasa_folder, CheckpointError, "has a lora_diag, which", {"kasa_config": None})
    edit_config(kasa_folder, kasa_config={"beta": 0.1})
    check_refused(kasa_folder, CheckpointError, "has no lora_diag;", tensors=without("lora_diag"))


def test_a_diagonal_of_another_size(kasa_folder):
    check_refused(
        kasa_folder,
        ShapeMismatchError,
        r"KaSA diagonal of .* \(5,\), but .* \(4,\)",
        tensors=replacing(torch.ones(5), "lora_diag"),
    )


def test_kasa_keeps_a_direction(tmp_path):
    folder = save(tenant_with(config_of(r=32)), tmp_path / "tenant")
    edit_config(folder, kasa_config={})

    def add(tensors):
        for key in [key for key in tensors if "lora_A" in key]:
            tensors[key.replace("lora_A.weight", "lora_diag")] = torch.ones(32)

    check_refused(folder, CheckpointError, "KaSA cannot take 33 directions", tensors=add)


def test_kasa_on_a_conv1d_is_refused_as_by_peft(tmp_path):
    config = config_of(target_modules=["attn.c_proj"])
    folder = save(tenant_with(config, "gpt2"), tmp_path / "tenant")
    edit_config(folder, kasa_config={})
    edit_tensors(
        folder,
        lambda t: t.update({k.replace("lora_A.weight", "lora_diag"): torch.ones(4) for k in list(t) if "lora_A" in k}),
    )
    with pytest.raises(UnsupportedMethodError, match="no KaSA for .*c_proj, whose weight is transposed"):
        form_of(folder, "gpt2")


# BD-LoRA


@pytest.mark.parametrize(
    ("blocks", "options"),
    [
        (SPLIT, {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}),
        (SPLIT, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ({**SPLIT, "nblocks": 4}, {"r": 8}),
        ({**SPLIT, "nblocks": 1}, {}),
        ({**SPLIT, "match_strict": False}, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
        ({"target_modules_bd_a": ["layers.0"], "target_modules_bd_b": ["layers.1"], "nblocks": 2}, {}),
        ({**SPLIT, "target_modules_bd_b": None}, {"target_modules": ["o_proj"], "lora_bias": True}),
    ],
    ids=str,
)
def test_bdlora(tmp_path, blocks, options):
    form = check_reloaded(config_of(use_bdlora=BdLoraConfig(**blocks), **options), tmp_path / "tenant")
    assert form.method == "bdlora" and not form.uses_base_weights


@pytest.fixture
def blocks_folder(tmp_path):
    return save(tenant_with(config_of(use_bdlora=BdLoraConfig(**SPLIT))), tmp_path / "tenant")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules_bd_a": ["proj"]}, "both factors of model.layers.0.self_attn.q_proj"),
        ({"target_modules_bd_b": []}, "no factor of model.layers.0.self_attn.q_proj"),
        ({"nblocks": 3}, "nblocks=3 of use_bdlora does not divide"),
        ({"nblocks": 10**30}, "use_bdlora of adapter_config.json is"),
        ({"nblocks": 0}, "use_bdlora of adapter_config.json is"),
        ({"nblocks": None}, "use_bdlora of adapter_config.json is"),
        ({"nblocks": "2"}, "use_bdlora of adapter_config.json is"),
        ({"target_modules_bd_a": "down_proj"}, "use_bdlora of adapter_config.json is"),
        ({"target_modules_bd_a": [3]}, "use_bdlora of adapter_config.json is"),
        ({"match_strict": "no"}, "use_bdlora of adapter_config.json is"),
        ({"of_tomorrow": 1}, "use_bdlora of adapter_config.json is"),
    ],
    ids=str,
)
def test_blocks_that_cannot_be(blocks_folder, changes, message):
    check_refused(blocks_folder, CheckpointError, f"tenant: .*{message}", {"use_bdlora": {**SPLIT, **changes}})


@pytest.mark.parametrize("value", [{}, True, 3, [1], "x"])
def test_use_bdlora_is_a_mapping(blocks_folder, value):
    check_refused(blocks_folder, CheckpointError, "use_bdlora", {"use_bdlora": value})


def test_blocks_of_another_number(blocks_folder):
    check_refused(
        blocks_folder,
        ShapeMismatchError,
        r"LoRA A of .*down_proj has shape \(4, 24\), but .* want \(4, 12\)",
        {"use_bdlora": {**SPLIT, "nblocks": 4}},
    )


def test_blocks_of_a_conv1d_are_refused(tmp_path):
    check_refused(
        save(tenant_with(config_of(target_modules=["c_attn"]), "gpt2"), tmp_path / "tenant"),
        UnsupportedMethodError,
        "no use_bdlora for .*c_attn, which is no nn.Linear",
        {"use_bdlora": {"target_modules_bd_a": ["c_attn"], "nblocks": 2}},
        name="gpt2",
    )


# QA-LoRA


def pooled(**options):
    """PEFT's variant on plain linears: PEFT itself chooses it on GPTQ's layers only, which compute the same."""
    config = config_of(use_qalora=True, **options)
    tenant = tenant_with(config, spread=0.0)
    generator = torch.Generator().manual_seed(0)
    for layer in tenant.modules():
        if isinstance(layer, Linear):
            QALoraLinearVariant.init(layer, "default", config)
            layer.lora_variant["default"] = QALoraLinearVariant()
            for factor in (layer.lora_A, layer.lora_B):
                factor["default"].weight.data = 0.2 * torch.randn(factor["default"].weight.shape, generator=generator)
    return tenant


@pytest.mark.parametrize(
    "options", [{}, {"qalora_group_size": 8}, {"use_rslora": True, "qalora_group_size": 2}], ids=str
)
def test_qalora(tmp_path, options):
    form = check_exact(pooled(**options), tmp_path / "tenant")
    assert form.method == "qalora" and form.rank == 4 and not form.uses_base_weights


def test_qalora_off_gptq_is_a_plain_lora(tmp_path):
    check_reloaded(config_of(use_qalora=True), tmp_path / "tenant")


def test_qalora_of_groups_of_one_is_refused(tmp_path):
    folder = save(pooled(qalora_group_size=1), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match="qalora_group_size=1 is not served"):
        form_of(folder)


@pytest.mark.parametrize("size", [0, -1, "8", 2.0, True, 10**30])
def test_group_sizes_that_cannot_be(tmp_path, size):
    check_refused(
        save(pooled(), tmp_path / "tenant"), CheckpointError, "qalora_group_size", {"qalora_group_size": size}
    )


@pytest.mark.parametrize("size", [4, 7, 1000])
def test_groups_of_another_size(tmp_path, size):
    check_refused(save(pooled(), tmp_path / "tenant"), ShapeMismatchError, "LoRA A of", {"qalora_group_size": size})


# Together


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True, "kasa_config": {}},
        {"use_dora": True, "use_bdlora": SPLIT},
        {"use_dora": True, "use_qalora": True},
        {"use_dora": True, "init_lora_weights": "mica"},
        {"use_bdlora": SPLIT, "kasa_config": {}},
        {"init_lora_weights": "pissa", "kasa_config": {}},
        {"init_lora_weights": "olora", "use_bdlora": SPLIT},
        {"init_lora_weights": "pissa", "use_qalora": True},
    ],
    ids=str,
)
def test_variants_together_are_refused(tmp_path, changes):
    check_refused(
        save(tenant_with(config_of()), tmp_path / "tenant"), UnsupportedMethodError, "are not served together", changes
    )


@pytest.mark.parametrize(
    "value", [True, 3, "x", [], {"beta": "0"}, {"beta": -1}, {"of_tomorrow": 1}, {"beta": 10**400}]
)
def test_kasa_config_is_its_mapping(kasa_folder, value):
    check_refused(kasa_folder, CheckpointError, r"kasa_config|beta", {"kasa_config": value})
