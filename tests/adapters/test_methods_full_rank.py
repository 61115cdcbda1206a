"""Methods of full rank → canonical form, by SVD where that is asked for."""

import copy

import peft.tuners.boft.layer as boft_layer
import pytest
import torch
from compatibility import approximated
from peft import (
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    FrodConfig,
    GloraConfig,
    HiraConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    RandLoraConfig,
    RoadConfig,
    ShiraConfig,
    SupertuningConfig,
    WaveFTConfig,
)
from peft_folders import base_of, edit_config, edit_tensors, key_of, save
from tenants import check_exact, form_of, tenant_with
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.base import BaseModel
from lorakit.adapters.choices import Choices
from lorakit.adapters.methods import convert, options
from lorakit.adapters.peft_reader import read_checkpoint
from lorakit.errors import CheckpointError, NonFiniteWeightsError, ShapeMismatchError, UnsupportedMethodError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of each BOFT that it cannot compile

# Name in the table → PEFT's class, its options, and whether the change depends on the base's weights.
METHODS = {
    "boft": (BOFTConfig, {"boft_block_size": 8}, True),
    "c3a": (C3AConfig, {"block_size": 16, "block_size_pattern": {"q_proj": 8}}, False),
    "fourierft": (FourierFTConfig, {"n_frequency": 60, "n_frequency_pattern": {"down_proj": 40}}, False),
    "frod": (FrodConfig, {"progressbar": False}, True),
    "glora (lora)": (GloraConfig, {"r": 3}, True),
    "hira": (HiraConfig, {"r": 4, "rank_pattern": {"q_proj": 3}}, True),
    "lokr (full)": (LoKrConfig, {"r": 8, "alpha": 6, "init_weights": False}, False),
    "miss (bat)": (MissConfig, {"r": 4, "init_weights": "bat"}, True),
    "oft": (OFTConfig, {"oft_block_size": 8}, True),
    "osf": (OSFConfig, {"rank_pattern": {"q_proj": 0.25}}, True),
    "randlora": (RandLoraConfig, {"r": 5}, False),
    "road": (RoadConfig, {"group_size": 8, "variant": "road_2"}, True),
    "shira": (ShiraConfig, {"r": 2}, False),
    "supertuning": (SupertuningConfig, {"sparsity": 0.9, "r": 2}, False),
    "waveft": (WaveFTConfig, {"n_frequency": 60}, False),
}


def config_of(method, targets=("q_proj", "down_proj"), **changes):
    kind, given, _ = METHODS[method]
    return kind(**{"target_modules": list(targets), **given, **changes})


def folder_of(tmp_path, method, name="llama", **changes):
    return save(tenant_with(config_of(method, **changes), name), tmp_path / "tenant")


@pytest.mark.parametrize("method", METHODS)
def test_equals_peft_where_nothing_is_cut_off(tmp_path, method):
    form = check_exact(tenant_with(config_of(method)), tmp_path / "tenant", svd_energy=1.0, method=method)
    assert form.uses_base_weights == METHODS[method][2]
    assert form.svd_errors.keys() == form.modules.keys()
    assert max(form.svd_errors.values()) < 1e-6


@pytest.mark.parametrize(
    ("method", "name", "changes"),
    [
        ("boft", "bert", {"targets": ["query", "dense"], "boft_block_size": 0, "boft_block_num": 4}),
        ("c3a", "t5", {"targets": ["q", "wi"]}),
        ("fourierft", "gpt2", {"targets": ["c_attn", "c_proj"]}),
        ("frod", "gpt2", {"targets": ["c_attn", "c_proj"]}),
        ("frod", "t5", {"targets": ["q", "wi"], "sparse_rate": 0.0}),
        ("glora (lora)", "llama-tied", {"config_C": "vector", "config_D_E": "none"}),
        ("hira", "gpt2", {"targets": ["c_attn", "mlp.c_fc"]}),
        ("hira", "llama-tied", {"targets": ["lm_head"]}),
        ("oft", "llama", {"oft_block_size": 0, "r": 3, "block_share": True, "use_cayley_neumann": False}),
        ("oft", "bert", {"targets": ["query", "dense"], "coft": True, "eps": 0.3}),
        ("osf", "bert", {"targets": ["query", "dense"], "effective_rank": 5}),
        ("randlora", "gpt2", {"targets": ["c_attn", "mlp.c_fc"], "sparse": True}),
        ("randlora", "llama", {"targets": ["q_proj", "k_proj", "lm_head"], "very_sparse": True}),
        ("road", "llama", {"variant": "road_1", "targets": "all-linear"}),
        ("road", "bert", {"variant": "road_4", "targets": ["query", "dense"]}),
        ("shira", "qwen3", {"targets": ["k_proj", "o_proj"]}),
        ("supertuning", "opt", {"targets": ["fc1", "q_proj"], "r": None, "select_top": False}),
        ("waveft", "gpt2", {"targets": ["c_attn", "c_proj"], "wavelet_family": "sym4"}),
        ("waveft", "llama", {"proportional_parameters": True, "use_idwt": False}),
    ],
    ids=str,
)
def test_other_places_and_options(tmp_path, method, name, changes):
    targets = changes.pop("targets", ("q_proj", "down_proj"))
    config = config_of(method, () if targets == "all-linear" else targets, **changes)
    if targets == "all-linear":
        config.target_modules = targets
    check_exact(tenant_with(config, name), tmp_path / "tenant", name, svd_energy=1.0, method=method)


def changes_of(tenant, name="llama", dtype=torch.float32):
    """Path → PEFT's merged weight and bias less the base's, (out, in) and (out,) or None, in fp64."""
    base = copy.deepcopy(base_of(name, dtype)).double()
    merged = copy.deepcopy(tenant).double().merge_and_unload()
    changes = {}
    for path, module in base.named_modules():
        if hasattr(module, "weight") and not torch.equal(module.weight, (new := merged.get_submodule(path)).weight):
            delta = (new.weight - module.weight).detach()
            bias = getattr(module, "bias", None)
            changes[path] = (
                delta.T if isinstance(module, Conv1D) else delta,
                None if bias is None else (new.bias - bias).detach(),
            )
    return changes


@pytest.mark.parametrize("method", METHODS)
def test_the_rank_is_the_least_that_keeps_the_energy_and_the_error_is_the_true_one(tmp_path, method):
    tenant = tenant_with(config_of(method))
    form = form_of(save(tenant, tmp_path / "tenant"), svd_energy=0.9)
    changes = changes_of(tenant)
    assert form.modules.keys() == changes.keys() == form.svd_errors.keys()
    for path, module in form.modules.items():
        delta, shift = changes[path]
        energies = torch.linalg.svdvals(delta) ** 2
        kept = energies.cumsum(0) / energies.sum()
        assert kept[module.rank - 1] >= 0.9 - 1e-6 and (module.rank == 1 or kept[module.rank - 2] < 0.9 + 1e-6)
        assert module.rank < min(delta.shape) and module.scale == 1 and module.c is None
        lost = (delta - module.b.double() @ module.a.double()).norm() / delta.norm()
        assert form.svd_errors[path] == pytest.approx(lost.item(), rel=1e-4)
        assert 0.1 < lost < 0.1**0.5 + 1e-6
        if module.d is None:
            assert shift is None or shift.norm() <= 1e-6
        else:
            torch.testing.assert_close(module.d.double(), shift, rtol=1e-5, atol=1e-6)
    largest = max(form.modules.values(), key=lambda module: module.rank)
    least = min(largest.in_features, largest.out_features)
    approximated(method, 0.9, largest.rank, least, max(form.svd_errors.values()))


@pytest.mark.parametrize("method", METHODS)
def test_a_16_bit_base_is_taken_as_peft_takes_it(tmp_path, method):
    dtype = torch.bfloat16
    tenant = tenant_with(config_of(method), dtype=dtype)
    form = form_of(save(tenant, tmp_path / "tenant"), dtype=dtype, svd_energy=1.0)
    for path, (delta, _) in changes_of(tenant, dtype=dtype).items():
        module = form.modules[path]
        assert (module.b.double() @ module.a.double() - delta).norm() / delta.norm() <= 2e-5


@pytest.mark.parametrize("method", METHODS)
def test_refused_unless_asked_for(tmp_path, method):
    folder = folder_of(tmp_path, method)
    with pytest.raises(
        UnsupportedMethodError, match="tenant: .*; export with svd_energy=0.999 to approximate it by SVD"
    ):
        form_of(folder)


@pytest.mark.parametrize("method", ["oft", "osf", "randlora"])
def test_random_numbers_of_the_user_are_left_alone(tmp_path, method):
    folder = folder_of(tmp_path, method)
    before = torch.random.get_rng_state()
    form_of(folder, svd_energy=0.9)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_exact_stays_exact(tmp_path):
    folder = folder_of(tmp_path, "lokr (full)", r=2)
    form = form_of(folder, svd_energy=0.5)
    assert not form.svd_errors and form.rank == 8
    folder = save(tenant_with(config_of("miss (bat)", init_weights=True)), tmp_path / "miss")
    assert not form_of(folder, svd_energy=0.5).svd_errors


def test_an_adapter_that_changes_nothing_has_no_error(tmp_path):
    folder = folder_of(tmp_path, "fourierft")
    edit_tensors(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    form = form_of(folder, svd_energy=0.9)
    assert set(form.svd_errors.values()) == {0.0} and form.rank == 1


class _Compiled:
    """What PEFT's CUDA extension computes, in plain torch."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*each) for each in blocks])]


@pytest.mark.parametrize("changes", [{"boft_block_size": 4}, {"boft_block_size": 0, "boft_block_num": 8}], ids=str)
def test_boft_with_several_factors(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", _Compiled)
    config = config_of("boft", boft_n_butterfly_factor=3, **changes)
    form = check_exact(tenant_with(config), tmp_path / "tenant", svd_energy=1.0)
    monkeypatch.undo()
    assert form_of(tmp_path / "tenant", svd_energy=1.0).rank == form.rank  # also where there is no such extension


# Refusals


@pytest.mark.parametrize(
    ("method", "option"),
    [("randlora", "save_projection"), ("frod", "save_projection"), ("supertuning", "save_precomputed_indices")],
)
def test_what_is_not_saved_and_cannot_be_made_again(tmp_path, method, option):
    folder = folder_of(tmp_path, method, **{option: False})
    with pytest.raises(UnsupportedMethodError, match=f"tenant: {option}=False is not served: .* with {option}=True"):
        form_of(folder, svd_energy=0.9)


@pytest.mark.parametrize(
    ("method", "changes", "error", "match"),
    [
        ("boft", {"boft_block_size": 5}, CheckpointError, "boft_block_size=5.* do not fit the .* inputs of"),
        ("boft", {"boft_block_size": 4}, ShapeMismatchError, "boft_R of"),
        ("boft", {"boft_n_butterfly_factor": 1 << 30}, None, ""),  # the checkpoint has one
        ("boft", {"boft_block_num": 4}, CheckpointError, "PEFT does not take"),
        ("c3a", {"block_size": 5, "block_size_pattern": {}}, CheckpointError, "block size should be a factor"),
        ("c3a", {"block_size_pattern": {"[": 8}}, CheckpointError, "PEFT cannot use this adapter at"),
        ("c3a", {"block_size_pattern": {"q_proj": "8"}}, CheckpointError, "block_size_pattern of"),
        ("fourierft", {"random_loc_seed": None}, CheckpointError, "random_loc_seed"),
        ("fourierft", {"n_frequency_pattern": {}}, ShapeMismatchError, "fourierft_spectrum of"),
        ("fourierft", {"n_frequency": 1 << 30}, CheckpointError, "less than or equal to the product"),
        ("fourierft", {"ifft2_norm": "ortho"}, UnsupportedMethodError, "ifft2_norm"),
        ("frod", {"sparse_rate": 0.9}, ShapeMismatchError, "frod_lambda_s_values of"),
        ("frod", {"sparse_rate": "0.1"}, CheckpointError, "sparse_rate"),
        ("hira", {"r": 1 << 30}, CheckpointError, "r=1073741824 asks for"),
        ("hira", {"rank_pattern": {"[": 4}}, CheckpointError, "rank_pattern is no regular expression"),
        ("oft", {"num_cayley_neumann_terms": 1 << 20}, CheckpointError, "num_cayley_neumann_terms"),
        ("oft", {"oft_block_size": 4}, ShapeMismatchError, "oft_R.weight of"),
        ("oft", {"r": 4}, CheckpointError, "PEFT does not take"),
        ("osf", {"effective_rank": 0, "rank_pattern": {}}, CheckpointError, "effective_rank"),
        ("osf", {"effective_rank": "8"}, CheckpointError, "effective_rank"),
        ("osf", {"rank_pattern": {"q_proj": []}}, CheckpointError, "rank_pattern"),
        ("randlora", {"r": 4}, ShapeMismatchError, "randlora_"),
        ("randlora", {"r": 1 << 30}, CheckpointError, "r=1073741824 asks for"),
        ("road", {"variant": "road_9"}, CheckpointError, "road_9"),
        ("road", {"group_size": 12}, CheckpointError, "group_size"),
        ("road", {"group_size": 1}, CheckpointError, "group_size"),
        ("shira", {"r": 1 << 20}, CheckpointError, "more shira params"),
        ("shira", {"mask_type": "mine"}, None, ""),  # the indices are in the checkpoint
        ("supertuning", {"sparsity": 2}, CheckpointError, "sparsity"),
        ("supertuning", {"r": None}, CheckpointError, "r is None"),
        ("waveft", {"wavelet_family": "none"}, CheckpointError, "none"),
        ("waveft", {"scaling": 1e300}, CheckpointError, "scaling"),
    ],
    ids=str,
)
def test_bad_options(tmp_path, method, changes, error, match):
    folder = folder_of(tmp_path, method)
    edit_config(folder, **changes)
    if error is None:
        assert form_of(folder, svd_energy=0.9).svd_errors
        return
    with pytest.raises(error, match=f"tenant.*{match}"):
        form_of(folder, svd_energy=0.9)


@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_are_missing_of_another_shape_or_not_finite(tmp_path, method):
    folder = folder_of(tmp_path, method)

    def parts(tensors):
        return [key for key in sorted(tensors) if "0.self_attn.q_proj" in key and "indices" not in key]

    def spoil(tensors):
        tensors[parts(tensors)[0]].fill_(torch.nan)

    def cut(tensors):
        key = parts(tensors)[-1]
        tensors[key] = tensors[key][..., :-1]

    edit_tensors(folder, spoil)
    with pytest.raises(NonFiniteWeightsError, match="tenant: .* holds NaN or Inf"):
        form_of(folder, svd_energy=0.9)
    edit_tensors(folder, cut)
    with pytest.raises(CheckpointError, match="tenant"):
        form_of(folder, svd_energy=0.9)
    edit_tensors(folder, lambda tensors: tensors.pop(parts(tensors)[-1]))
    with pytest.raises(CheckpointError, match="tenant"):
        form_of(folder, svd_energy=0.9)


@pytest.mark.parametrize(
    ("method", "key"),
    [("shira", "shira_indices"), ("supertuning", "supertuning_indices"), ("frod", "frod_s_indices")],
)
@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_indices_outside_of_the_weight(tmp_path, method, key, value):
    folder = folder_of(tmp_path, method)
    edit_tensors(folder, lambda tensors: tensors[key_of(tensors, key)].fill_(value))
    with pytest.raises(CheckpointError, match=f"tenant: .*{key}.* has an index out of 0 to"):
        form_of(folder, svd_energy=0.9)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("randlora", "base_model.randlora_A"),
        ("randlora", "base_model.randlora_B"),
        ("frod", "base_model.frod_V.mlp_down_proj"),
        ("frod", "base_model.frod_s_indices.mlp_down_proj"),
        ("frod", "base_model.frod_s_size.mlp_down_proj"),
    ],
)
def test_what_modules_share(tmp_path, method, key):
    folder = folder_of(tmp_path, method)

    def cut(tensors):
        tensors[key] = tensors[key][..., :-1]

    edit_tensors(folder, cut)
    with pytest.raises(CheckpointError, match=rf"tenant: .*{key}"):
        form_of(folder, svd_energy=0.9)
    edit_tensors(folder, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"tenant: there is no {key}"):
        form_of(folder, svd_energy=0.9)


def test_a_module_with_projections_of_its_own(tmp_path):
    folder = folder_of(tmp_path, "randlora")
    edit_tensors(folder, lambda tensors: tensors[key_of(tensors, "q_proj.randlora_A")].add_(1))
    with pytest.raises(CheckpointError, match="tenant: a module's randlora_A differs from base_model.randlora_A"):
        form_of(folder, svd_energy=0.9)


def test_a_surplus_tensor(tmp_path):
    folder = folder_of(tmp_path, "supertuning", r=None)
    name = "base_model.model.model.layers.0.self_attn.q_proj.supertuning_lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(2, 32)}))
    with pytest.raises(CheckpointError, match="q_proj has a supertuning_lora_A.weight, which its configuration"):
        form_of(folder, svd_energy=0.9)


def test_a_conv1d_is_refused_as_by_peft(tmp_path):
    folder = folder_of(tmp_path, "road")
    edit_config(folder, target_modules=["c_attn"])

    def move(tensors):
        for key in list(tensors):
            tensor = tensors.pop(key)
            if "q_proj" in key:
                moved = key.replace("model.model.layers", "model.transformer.h")
                tensors[moved.replace("self_attn.q_proj", "attn.c_attn")] = tensor

    edit_tensors(folder, move)
    with pytest.raises(UnsupportedMethodError, match="no ROAD for .*c_attn, which is no nn.Linear"):
        form_of(folder, "gpt2", svd_energy=0.9)


@pytest.mark.parametrize("method", ["osf", "frod", "oft"])
def test_a_packed_base(tmp_path, method, monkeypatch):
    """What takes W apart needs it as it was; a rotation needs only what the packed weight stands for."""
    folder = folder_of(tmp_path, method)
    base = BaseModel.of(base_of())
    monkeypatch.setattr(base, "stored", lambda name: None)
    checkpoint, choices = read_checkpoint(folder), Choices(svd_energy=0.9)
    if method == "oft":
        assert convert(checkpoint, base, choices).svd_errors == form_of(folder, svd_energy=0.9).svd_errors
        return
    with pytest.raises(UnsupportedMethodError, match="takes the base's weight of .* apart, which is quantised"):
        convert(checkpoint, base, choices)


@pytest.mark.parametrize("method", ["hira", "oft"])
def test_an_embedding_is_refused(tmp_path, method):
    changes = {"rank_pattern": {}} if method == "hira" else {}
    folder = folder_of(tmp_path, method, targets=["embed_tokens"], **changes)
    with pytest.raises(UnsupportedMethodError, match="at linear modules alone, and model.embed_tokens is an embedding"):
        form_of(folder, svd_energy=0.9)


@pytest.mark.parametrize("method", ["hira", "randlora", "glora (lora)", "supertuning"])
def test_what_no_tensor_bounds_may_not_take_all_memory(tmp_path, method, monkeypatch):
    folder = folder_of(tmp_path, method)
    monkeypatch.setattr(options, "MOST_ELEMENTS", 11)
    with pytest.raises(CheckpointError, match=r"tenant: r=\d asks for .* numbers, more than the 11"):
        form_of(folder, svd_energy=0.9)
