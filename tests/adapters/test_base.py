"""Base models read from folders: the right weights whatever their files look like, typed errors where they are bad."""

import copy
import json
import os

import pytest
import torch
from architectures import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_folders import base_of, small
from safetensors.torch import load_file, save_file

from lorakit.adapters.base import BaseModel
from lorakit.errors import BaseModelMismatchError, BaseModelNotFoundError, LorakitError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    base_of().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def config_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    base_of().config.save_pretrained(folder)
    return (folder / "config.json").read_text()


def edit(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_and_bias_is_the_live_ones(name, tmp_path):
    model = base_of(name)
    model.save_pretrained(tmp_path)
    base, live = BaseModel.of(tmp_path), BaseModel.of(model)
    assert (base.architecture, base.places, base.parameters) == (live.architecture, live.places, live.parameters)
    assert base.all_linear == live.all_linear
    for path, place in base.places.items():
        weight = base.weight(path)
        one_axis = place.kind == "norm"
        assert weight.shape == ((place.out_features,) if one_axis else (place.out_features, place.in_features))
        assert torch.equal(weight, live.weight(path)), path
        bias, expected = base.bias(path), live.bias(path)
        assert (bias is None and expected is None) or torch.equal(bias, expected)
    assert base.parameter("no.such.weight") is None and live.parameter("no.such.weight") is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_checkpoint_of_the_inner_model_is_found_without_its_prefix(name, tmp_path):
    """Many bases are stored as the bare model, whose names lack the class's prefix."""
    model = base_of(name)
    inner = model.base_model
    assert inner is not model or name == "t5"
    inner.save_pretrained(tmp_path)
    base, live = BaseModel.of(tmp_path, architecture=type(model).__name__), BaseModel.of(model)
    inner_parameters = {id(parameter) for parameter in inner.parameters()}
    for name_, parameter in model.named_parameters():
        if id(parameter) in inner_parameters:
            assert torch.equal(base.parameter(name_), live.parameter(name_)), name_
        else:  # transformers would make it up at random
            assert base.parameter(name_) is None


def test_names_that_transformers_maps_are_found(folder):
    """What no rule of ours finds is found by loading the model once, as transformers maps it."""
    tensors = load_file(folder / WEIGHTS)
    tensors["model.model.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert torch.equal(BaseModel.of(folder).parameter("model.norm.weight"), base_of().model.norm.weight)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pefts_all_linear_is_ours(name):
    tenant = get_peft_model(copy.deepcopy(base_of(name)), LoraConfig(target_modules="all-linear"))
    model = tenant.get_base_model()
    adapted = {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert BaseModel.of(base_of(name)).all_linear == adapted
    assert BaseModel.of(tenant).all_linear == adapted, "also where PEFT has wrapped it"


def test_an_adapter_file_beside_the_weights_is_no_part_of_them(folder):
    small().save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").exists()
    base = BaseModel.of(folder)
    assert torch.equal(base.weight("lm_head"), base_of().lm_head.weight)


def test_weights_in_a_pickle_are_read_as_transformers_reads_them(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.equal(BaseModel.of(folder).weight("lm_head"), base_of().lm_head.weight)


# Bad folders


@pytest.mark.parametrize("source", ["", "org/none", "nowhere", "x" * 5000, "a\0b", "what is this?"])
def test_no_such_base(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelNotFoundError, match=r"base_model"):
        BaseModel.of(source)


def test_an_empty_folder_and_a_file(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelNotFoundError, match=r"empty cannot be opened.* live model as base_model"):
        BaseModel.of(tmp_path / "empty")
    with pytest.raises(BaseModelNotFoundError, match=r"neither a folder here"):
        BaseModel.of(folder / WEIGHTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ...},
        {"model_type": "of_tomorrow"},
        {"model_type": 3},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["LlamaOfTomorrow"]},
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModel"]},
        {"architectures": ["Trainer"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": {"a": 1}},
        {"architectures": [3]},
        {"hidden_size": "many"},
        {"hidden_size": -1},
        {"hidden_size": 33},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"vocab_size": 1.5},
        {"hidden_act": "none such"},
        {"torch_dtype": "float99"},
        {"dtype": 3},
        {"quantization_config": {"quant_method": "of_tomorrow"}},
    ],
    ids=str,
)
def test_a_bad_configuration(folder, changes):
    edit(folder, **changes)
    try:
        base = BaseModel.of(folder)
    except BaseModelNotFoundError as error:
        assert str(folder) in str(error) and "live model as base_model" in str(error)
    else:  # transformers takes some
        assert base.places


def test_code_beside_a_model_is_neither_run_nor_asked_for(folder, tmp_path, monkeypatch):
    proof = tmp_path / "proof"
    (folder / "mine.py").write_text(
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Mine(LlamaConfig): pass\n"
    )
    edit(folder, model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(BaseModelNotFoundError, match="cannot be opened"):
        BaseModel.of(folder)
    assert not proof.exists()


@pytest.mark.parametrize("length", [0, 7, 8, 100, 5000, -1])
def test_truncated_weights(folder, length):
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, length if length >= 0 else size - 1)
    with pytest.raises(BaseModelNotFoundError, match=r"model.safetensors is damaged or cannot be read.*again"):
        BaseModel.of(folder).weight("lm_head")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    base = BaseModel.of(folder)
    assert base.places
    with pytest.raises(BaseModelNotFoundError, match=r"the weights of the base model in .*cannot be read.*live model"):
        base.weight("lm_head")


def test_weights_of_other_shapes_than_the_configuration(folder):
    edit(folder, intermediate_size=64)
    with pytest.raises(BaseModelNotFoundError, match=r"the weights of the base model in .*cannot be read"):
        BaseModel.of(folder).weight("model.layers.0.mlp.up_proj")


def test_a_weight_that_is_missing(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    base = BaseModel.of(folder)
    assert base.parameter("model.layers.1.mlp.up_proj.weight") is None
    with pytest.raises(BaseModelNotFoundError, match=r"has no weight 'model.layers.1.mlp.up_proj.weight'"):
        base.weight("model.layers.1.mlp.up_proj")


@settings(max_examples=60)
@given(data=st.data())
def test_any_configuration_opens_or_is_a_typed_error(config_text, tmp_path_factory, data):
    config = json.loads(config_text)
    folder = tmp_path_factory.getbasetemp() / "any-config"
    folder.mkdir(exist_ok=True)
    value = st.sampled_from([None, True, 0, 1, -1, 7, 2.5, "", "x", [], [1], {}, {"a": 1}, "llama", "gpt2"])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2, unique=True)):
        config[key] = data.draw(value)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        assert BaseModel.of(folder).architecture
    except LorakitError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": {}}]
)
def test_a_live_base_that_peft_has_changed_is_refused(options):
    base = copy.deepcopy(base_of())
    wrapped = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, **options))
    for model in (base, wrapped):
        with pytest.raises(BaseModelMismatchError, match="as it was before"):
            BaseModel.of(model)
