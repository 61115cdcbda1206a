"""`lorakit.export` and back: every kind of source and base, round trips to the byte, refusals that leave nothing."""

import copy
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, METHODS, adapt
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft_folders import CONFIG, WEIGHTS, base_of, edit_config, edit_tensors, key_of, relative, save, small, tree
from safetensors.torch import load_file

import lorakit
from lorakit import AdapterBank
from lorakit.errors import (
    AdapterExistsError,
    AdapterNameError,
    BankError,
    BaseModelMismatchError,
    BaseModelNotFoundError,
    CheckpointError,
    ConfigError,
    LorakitError,
    ModuleNotFoundInBaseError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnsupportedMethodError,
)

LLAMA = ARCHITECTURES["llama"]


@pytest.fixture(scope="module")
def tenants():
    return {"sql": small(0), "law": small(1, r=2, use_rslora=True), "code": small(2, use_dora=True)}


@pytest.fixture(scope="module")
def saved(tenants, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {name: save(tenant, root / name) for name, tenant in tenants.items()}


@pytest.fixture
def runs(saved, tmp_path):
    """The saved adapters, to be changed as you like."""
    for name, folder in saved.items():
        shutil.copytree(folder, tmp_path / "runs" / name)
    return {name: tmp_path / "runs" / name for name in saved}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base_of().save_pretrained(folder)
    return folder


@pytest.fixture
def nothing_left(tmp_path, monkeypatch):
    """After the test, all is as it was before, temporary folders too."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield tmp_path / "new" / "deep" / "bank"
    assert not (tmp_path / "new").exists()
    assert tree(tmp_path / "tmp") == {}


def same_logits(base, bank, expected):
    model = lorakit.MultiLoraModel(copy.deepcopy(base), bank)
    inputs = LLAMA.inputs(3)
    with torch.no_grad():
        for name, tenant in expected.items():
            assert relative(model(**inputs, adapter_ids=name).logits, tenant(**inputs).logits) < 1e-5


# Sources


def test_a_mapping_of_folders(tenants, saved, tmp_path):
    seen = []
    bank = lorakit.export(saved, tmp_path / "bank", base_model=base_of(), progress=lambda *args: seen.append(args))
    assert bank.names == ["sql", "law", "code"] and bank.path == tmp_path / "bank"
    assert [(e.method, e.rank, e.source) for e in bank.values()] == [
        ("lora", 4, str(saved["sql"])),
        ("rslora", 2, str(saved["law"])),
        ("dora", 4, str(saved["code"])),
    ]
    assert [e.uses_base_weights for e in bank.values()] == [False, False, True]
    assert [name for name, _ in seen] == bank.names and all(nbytes > 0 for _, nbytes in seen)
    bank.verify()
    same_logits(base_of(), bank, tenants)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank"]


def test_a_list_takes_the_names_of_folders(saved, tmp_path):
    bank = lorakit.export([saved["sql"], f"{saved['law']}/"], tmp_path / "bank", base_model=base_of())
    assert bank.names == ["sql", "law"]


def test_live_models_and_folders_together(tenants, saved, tmp_path):
    sources = {"live": tenants["sql"], "saved": saved["sql"], "dora": tenants["code"]}
    bank = lorakit.export(sources, tmp_path / "bank", base_model=base_of())
    assert bank["live"].source == "PeftModel:default"
    assert torch.equal(bank.read("live").weights, bank.read("saved").weights)
    same_logits(base_of(), bank, {"live": tenants["sql"], "saved": tenants["sql"], "dora": tenants["code"]})


def test_a_live_model_is_left_as_it_was(tmp_path):
    tenant = small(3)
    before = {key: tensor.clone() for key, tensor in tenant.state_dict().items()}
    inference = tenant.peft_config["default"].inference_mode
    lorakit.export([tenant], tmp_path / "bank", base_model=tenant)
    after = tenant.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert tenant.peft_config["default"].inference_mode == inference and tenant.active_adapter == "default"


def test_one_live_model_with_several_adapters(tmp_path):
    options = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    tenant = get_peft_model(copy.deepcopy(base_of()), LoraConfig(r=4, **options), adapter_name="sql").eval()
    tenant.add_adapter("law", LoraConfig(r=2, **options))
    bank = None
    for name in ("sql", "law"):
        tenant.set_adapter(name)
        if bank is None:
            bank = lorakit.export([tenant], tmp_path / "bank", base_model=base_of())
        else:
            bank.add(name, tenant, base_model=base_of())
    assert bank.names == ["sql", "law"] and [e.rank for e in bank.values()] == [4, 2]
    model = lorakit.MultiLoraModel(copy.deepcopy(base_of()), bank)
    with torch.no_grad():
        for name in ("sql", "law"):
            tenant.set_adapter(name)
            theirs = tenant(**LLAMA.inputs(2)).logits
            assert relative(model(**LLAMA.inputs(2), adapter_ids=name).logits, theirs) < 1e-5


def test_an_adapter_with_a_name_is_found_in_its_subfolder(tmp_path):
    options = {"target_modules": ["q_proj"], "init_lora_weights": False}
    tenant = get_peft_model(copy.deepcopy(base_of()), LoraConfig(r=4, **options), adapter_name="sql")
    tenant.save_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"its subfolders \['sql'\] do: name one"):
        lorakit.export([tmp_path / "run"], tmp_path / "bank", base_model=base_of())
    assert lorakit.export([tmp_path / "run" / "sql"], tmp_path / "bank", base_model=base_of()).names == ["sql"]


def test_a_safe_pickle_exports_to_the_same_bytes(runs, saved, tmp_path):
    torch.save(load_file(runs["sql"] / WEIGHTS), runs["sql"] / "adapter_model.bin")
    (runs["sql"] / WEIGHTS).unlink()
    bank = lorakit.export([runs["sql"]], tmp_path / "bank", base_model=base_of())
    bank.export_peft("sql", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (saved["sql"] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_can_be_asked_for(saved, tmp_path, dtype):
    bank = lorakit.export(saved, tmp_path / "bank", base_model=base_of(), dtype=dtype)
    assert {entry.dtype for entry in bank.values()} == {dtype}
    with torch.no_grad():
        model = lorakit.MultiLoraModel(copy.deepcopy(base_of()), bank)
        whole = lorakit.MultiLoraModel(
            copy.deepcopy(base_of()), lorakit.export(saved, tmp_path / "whole", base_model=base_of())
        )
        logits, exact = (m(**LLAMA.inputs(3), adapter_ids=["sql", "law", "code"]).logits for m in (model, whole))
    assert relative(logits, exact) <= {torch.float32: 0, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


# Bases


def test_a_base_folder_gives_the_same_bank_as_the_live_base(saved, base_folder, tmp_path):
    by_folder = lorakit.export(saved, tmp_path / "folder", base_model=base_folder)
    live = lorakit.export(saved, tmp_path / "live", base_model=base_of())
    assert by_folder.base_id == str(base_folder)
    assert by_folder.fingerprint == live.fingerprint
    for name in saved:
        for item in ("weights", "vectors"):
            assert torch.equal(getattr(by_folder.read(name), item), getattr(live.read(name), item))
    lorakit.MultiLoraModel.from_pretrained(base_folder, by_folder)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5", "opt", "gemma3"])
@pytest.mark.parametrize("method", ["dora", "embeddings-dora"])
def test_weights_read_from_a_folder_are_the_live_ones(tmp_path, name, method):
    """DoRA needs the base's weights: one file or shards, tied or not, under whatever names they are stored."""
    base = ARCHITECTURES[name].build()
    base.save_pretrained(tmp_path / "one")
    base.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    tenant = adapt(base, 0, **METHODS[method](ARCHITECTURES[name]))
    banks = [
        lorakit.export({"x": tenant}, tmp_path / f"bank-{i}", base_model=source)
        for i, source in enumerate([base, tmp_path / "one", tmp_path / "shards"])
    ]
    for bank in banks[1:]:
        assert torch.equal(bank.read("x").vectors, banks[0].read("x").vectors)
        assert bank.fingerprint["sample"].keys() == banks[0].fingerprint["sample"].keys()


def test_a_half_precision_base_serves_from_its_folder(tmp_path):
    base = LLAMA.build(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tenant = adapt(base, 0, target_modules=["q_proj", "lm_head"], use_dora=True)
    bank = lorakit.export({"x": tenant}, tmp_path / "bank", base_model=tmp_path / "base")
    assert torch.equal(
        bank.read("x").vectors,
        lorakit.export({"x": tenant}, tmp_path / "live", base_model=base).read("x").vectors,
    )
    model = lorakit.MultiLoraModel.from_pretrained(tmp_path / "base", bank)
    assert model.dtype == torch.bfloat16
    lorakit.MultiLoraModel.from_pretrained(tmp_path / "base", bank, dtype=torch.float32)
    lorakit.MultiLoraModel.from_pretrained(tmp_path / "base", bank, dtype=torch.float16)


def test_the_base_is_the_one_that_the_adapter_names(runs, base_folder, tmp_path):
    for folder in runs.values():
        edit_config(folder, base_model_name_or_path=str(base_folder))
    bank = lorakit.export(runs, tmp_path / "bank")
    assert bank.base_id == str(base_folder)
    assert lorakit.export([runs["sql"]], tmp_path / "given", base_model=base_of()).base_id == ""


def test_adapters_that_name_different_bases_need_one_given(runs, base_folder, tmp_path, nothing_left):
    for name, folder in runs.items():
        edit_config(folder, base_model_name_or_path=str(base_folder) if name == "sql" else "org/another")
    with pytest.raises(BaseModelMismatchError, match=r"law was trained on 'org/another', but .*sql on .*base_model"):
        lorakit.export(runs, nothing_left)
    lorakit.export(runs, tmp_path / "bank", base_model=base_folder)


@pytest.mark.parametrize("recorded", [None, "", ..., 3, ["a"], {"a": 1}])
def test_no_base_anywhere(runs, recorded, nothing_left):
    edit_config(runs["sql"], base_model_name_or_path=recorded)
    with pytest.raises(BaseModelNotFoundError, match=r"sql .*base_model \(`--base`\)"):
        lorakit.export([runs["sql"]], nothing_left)


@pytest.mark.parametrize("base", ["org/not-in-the-cache", "nowhere", "a/b/c", "bad name!", "x" * 5000, ""])
def test_a_base_that_is_not_there_offline(saved, base, nothing_left):
    with pytest.raises(BaseModelNotFoundError, match=r"base_model"):
        lorakit.export(saved, nothing_left, base_model=base)


@pytest.mark.parametrize("base", [3, ["org/base"], b"org/base", object()])
def test_a_base_of_a_wrong_type(saved, base, nothing_left):
    with pytest.raises(BaseModelNotFoundError, match=rf"given as a {type(base).__name__}; name a folder or a Hub id"):
        lorakit.export(saved, nothing_left, base_model=base)


def test_bases_that_do_not_fit(saved, nothing_left):
    with pytest.raises(ModuleNotFoundInBaseError, match="GPT2LMHeadModel.*trained on another base"):
        lorakit.export(saved, nothing_left, base_model=ARCHITECTURES["gpt2"].build())
    wide = dataclasses.replace(LLAMA, options={**LLAMA.options, "intermediate_size": 64}).build()
    with pytest.raises(ShapeMismatchError, match=r"down_proj has shape \(4, 48\).* want \(4, 64\)"):
        lorakit.export(saved, nothing_left, base_model=wide)
    shallow = dataclasses.replace(LLAMA, options={**LLAMA.options, "num_hidden_layers": 1}).build()
    with pytest.raises(ModuleNotFoundInBaseError, match=r"no module 'model.layers.1"):
        lorakit.export(saved, nothing_left, base_model=shallow)
    deep = dataclasses.replace(LLAMA, options={**LLAMA.options, "num_hidden_layers": 3}).build()
    with pytest.raises(CheckpointError, match=r"lack 2 of the modules .*'model.layers.2.*another base"):
        lorakit.export(saved, nothing_left, base_model=deep)


def test_a_merged_base_is_refused(saved, nothing_left):
    tenant = small(0)
    tenant.merge_adapter()
    with pytest.raises(BaseModelMismatchError, match="merged into its weights; call unmerge_adapter first"):
        lorakit.export(saved, nothing_left, base_model=tenant)


def test_a_base_on_the_meta_device_is_refused(saved, nothing_left):
    with pytest.raises(BaseModelNotFoundError, match="not in memory .* give the base as its folder or Hub id"):
        lorakit.export(saved, nothing_left, base_model=copy.deepcopy(base_of()).to("meta"))


# Task types


TASKS = {
    "CAUSAL_LM": (transformers.AutoModelForCausalLM, "llama", ["q_proj"]),
    "SEQ_2_SEQ_LM": (transformers.AutoModelForSeq2SeqLM, "t5", ["q", "wo"]),
    "FEATURE_EXTRACTION": (transformers.AutoModel, "bert", ["query"]),
    "SEQ_CLS": (transformers.AutoModelForSequenceClassification, "bert", ["query"]),
    "TOKEN_CLS": (transformers.AutoModelForTokenClassification, "bert", ["query"]),
    "QUESTION_ANS": (transformers.AutoModelForQuestionAnswering, "bert", ["query"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_task_type_decides_the_base_class(tmp_path, task):
    auto_class, name, targets = TASKS[task]
    plain = ARCHITECTURES[name].build()
    if task == "QUESTION_ANS":
        plain.config.num_labels = 2  # a start and an end
    plain.save_pretrained(tmp_path / "base")
    base = auto_class.from_pretrained(tmp_path / "base").eval()
    config = LoraConfig(task_type=task, target_modules=targets, init_lora_weights=False)
    tenant = get_peft_model(copy.deepcopy(base), config).eval()
    save(tenant, tmp_path / "tenant")
    bank = lorakit.export({"x": tmp_path / "tenant"}, tmp_path / "bank")
    assert bank.fingerprint["architecture"] == type(base).__name__
    assert bank.base_id == str(tmp_path / "base")
    again = lorakit.export({"x": tmp_path / "tenant"}, tmp_path / "again")
    assert again.fingerprint == bank.fingerprint, "a head that the base lacks is random, so no part of it"
    model = lorakit.MultiLoraModel.from_pretrained(tmp_path / "base", bank)
    inputs = ARCHITECTURES[name].inputs(2)
    with torch.no_grad():
        mine, theirs = (m(**inputs, **options)[0] for m, options in ((model, {"adapter_ids": "x"}), (tenant, {})))
    assert relative(mine, theirs) < 1e-5, "a head that the base lacks is the tenant's own"
    assert {t.value for t in TaskType} == set(TASKS)


def test_an_unknown_task_type_is_refused(runs, base_folder, nothing_left):
    for value in ("POETRY", ["CAUSAL_LM"], {"a": 1}, 3):
        edit_config(runs["sql"], task_type=value)
        with pytest.raises(CheckpointError, match="sql: PEFT does not take.*(task type|task_type|unhashable)"):
            lorakit.export([runs["sql"]], nothing_left, base_model=base_folder)


# And back


ROUND_TRIPS = {
    **{name: METHODS[name](LLAMA) for name in METHODS},
    "rslora-patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {r".*layers\.1\..*": 9, "q_proj": 1},
        "alpha_pattern": {"mlp.*": 0.3},
    },
    "lm_head": {"target_modules": ["lm_head"]},
    "regular expression": {"target_modules": r".*\.[01]\..*(q|up)_proj"},
    "some layers": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "odd numbers": {"target_modules": ["k_proj"], "lora_alpha": 0.1, "r": 3, "lora_dropout": 1e-5},
    "causal-lm": {"target_modules": ["k_proj"], "task_type": "CAUSAL_LM", "revision": "ünicode-法"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("what", ROUND_TRIPS)
def test_the_checkpoint_comes_back_byte_for_byte(tmp_path, what, dtype):
    tenant = adapt(base_of(), 5, **ROUND_TRIPS[what])
    for parameter in tenant.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = save(tenant, tmp_path / "tenant")
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS).values()} == {dtype}
    base = LLAMA.build(dtype)
    bank = lorakit.export([folder], tmp_path / "bank", base_model=base)
    assert bank["tenant"].dtype == dtype
    out = AdapterBank.open(tmp_path / "bank").export_peft("tenant", tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [CONFIG, WEIGHTS]
    assert (out / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (out / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()
    again = lorakit.export([out], tmp_path / "again", base_model=base)
    assert again["out"].blake3 == bank["tenant"].blake3
    if dtype == torch.float32:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base_of()), out).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**LLAMA.inputs(2)).logits, tenant(**LLAMA.inputs(2)).logits)


@pytest.mark.parametrize("method", ["embeddings", "embeddings-dora"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_whole_embeddings_that_equal_the_bases_are_dropped(tmp_path, name, method):
    """PEFT writes them beside an adapter on an embedding, unless save_embedding_layers=False."""
    base = base_of(name)
    tenant = adapt(base, 0, **METHODS[method](ARCHITECTURES[name]))
    tenant.save_pretrained(tmp_path / "tenant")
    saved = load_file(tmp_path / "tenant" / WEIGHTS)
    copies = {key for key in saved if key.endswith("base_layer.weight")}
    assert copies
    bank = lorakit.export([tmp_path / "tenant"], tmp_path / "bank", base_model=base)
    out = bank.export_peft("tenant", tmp_path / "out")
    back = load_file(out / WEIGHTS)
    assert back.keys() == saved.keys() - copies
    assert all(back[key].dtype == saved[key].dtype and torch.equal(back[key], saved[key]) for key in back)
    assert (out / CONFIG).read_bytes() == (tmp_path / "tenant" / CONFIG).read_bytes()
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
        assert torch.equal(loaded(**LLAMA.inputs(2)).logits, tenant(**LLAMA.inputs(2)).logits)


# Refusals


@pytest.mark.parametrize(
    "adapters", [{}, [], (), "runs/sql", b"runs", None, 3, Path("runs"), {"sql": None}, [None], [3]], ids=repr
)
def test_adapters_that_are_none(adapters, nothing_left):
    with pytest.raises(LorakitError, match="give|name|neither|choose|Choose"):
        lorakit.export(adapters, nothing_left, base_model=base_of())


def test_a_live_model_alone_is_no_list(tenants, nothing_left):
    with pytest.raises(BankError, match="adapters is a PeftModel; give a list of sources, or a mapping"):
        lorakit.export(tenants["sql"], nothing_left, base_model=base_of())


@pytest.mark.parametrize(
    "name", ["", "../x", "/x", "a/b", ".", "..", ".hidden", "a b", "ä", "x\n", "x\0", "con", "x" * 129, None, 3, ("a",)]
)
def test_names_that_cannot_be(saved, name, nothing_left):
    with pytest.raises(AdapterNameError, match="cannot be an adapter's name. Choose 1 to 128 letters"):
        lorakit.export({name: saved["sql"]}, nothing_left, base_model=base_of())


def test_a_name_that_comes_twice(saved, runs, nothing_left):
    with pytest.raises(AdapterExistsError, match=r"two sources would be called 'sql', .*runs.*; name them apart"):
        lorakit.export([saved["sql"], runs["sql"]], nothing_left, base_model=base_of())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, "bfloat16", 3, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be(saved, dtype, nothing_left):
    with pytest.raises(ConfigError, match="dtype is .*; use torch.float32, torch.bfloat16, torch.float16, or None"):
        lorakit.export(saved, nothing_left, base_model=base_of(), dtype=dtype)


def poison(folder):
    edit_tensors(folder, lambda tensors: tensors[key_of(tensors, "lora_B")].fill_(torch.nan))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (poison, NonFiniteWeightsError, "adapter 'code': B of .* NaN"),
        (lambda folder: shutil.rmtree(folder), CheckpointError, "code' is neither a folder"),
        (lambda folder: os.truncate(folder / WEIGHTS, 100), CheckpointError, "code: .*truncated"),
        (lambda folder: (folder / CONFIG).write_text("{"), CheckpointError, "code: .*JSON"),
        (lambda folder: edit_config(folder, peft_type="OFT"), UnsupportedMethodError, "code: PEFT's OFT"),
        (lambda folder: edit_config(folder, r=5), ShapeMismatchError, "code: LoRA A"),
    ],
)
def test_one_bad_adapter_among_good_ones_leaves_nothing(runs, damage, error, message, nothing_left):
    damage(runs["code"])
    with pytest.raises(error, match=message):
        lorakit.export(runs, nothing_left, base_model=base_of())


def test_an_interrupt_leaves_nothing(saved, nothing_left):
    def stop(name, nbytes):
        if name == "law":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorakit.export(saved, nothing_left, base_model=base_of(), progress=stop)


@pytest.mark.parametrize("call", ["os.fsync", "os.pwrite", "os.replace"])
def test_a_full_disk_leaves_nothing_and_is_said_so(saved, nothing_left, monkeypatch, call):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with pytest.raises(BankError, match=r"cannot write .*bank.*: No space left on device\. Free space"):
            lorakit.export(saved, nothing_left, base_model=base_of())


# The bank's place


def test_an_empty_folder_is_taken(saved, tmp_path):
    (tmp_path / "bank").mkdir()
    assert lorakit.export(saved, tmp_path / "bank", base_model=base_of()).names == list(saved)


def test_a_folder_in_use_is_left_alone(saved, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    for name in ("notes", "file"):
        for overwrite in (False, True):
            with pytest.raises(BankError, match=f"{name}' is (not empty|a file).*: choose an empty or a new folder"):
                lorakit.export(saved, tmp_path / name, base_model=base_of(), overwrite=overwrite)
    for name in ("file/bank", "file/deep/bank", "x" * 300):
        with pytest.raises(BankError, match="cannot write .*: (Not a directory|File exists|File name too long)"):
            lorakit.export(saved, tmp_path / name, base_model=base_of())
    assert tree(tmp_path) == before


@pytest.mark.parametrize("index", ['{"format_version": 1}', '{"format_version": 99}', "no JSON", ""])
def test_a_bank_that_cannot_be_read_is_replaced_if_asked(saved, tmp_path, index):
    """One of an older lorakit's, or a damaged one; its shards go, and their numbers are not used again."""
    lorakit.export(saved, tmp_path / "bank", base_model=base_of())
    (tmp_path / "bank" / "bank.json").write_text(index)
    before = {path.name for path in (tmp_path / "bank").glob("*.safetensors")}
    with pytest.raises(BankError, match="holds a bank already"):
        lorakit.export([saved["law"]], tmp_path / "bank", base_model=base_of())
    with pytest.raises(LorakitError):
        lorakit.export(["gone"], tmp_path / "bank", base_model=base_of(), overwrite=True)
    assert {path.name for path in (tmp_path / "bank").glob("*.safetensors")} == before
    bank = lorakit.export([saved["law"]], tmp_path / "bank", base_model=base_of(), overwrite=True)
    bank.verify()
    assert bank.names == ["law"] and not before & {path.name for path in (tmp_path / "bank").glob("*.safetensors")}


def test_a_bank_is_replaced_only_when_asked(saved, tmp_path):
    lorakit.export(saved, tmp_path / "bank", base_model=base_of())
    before = tree(tmp_path)
    with pytest.raises(BankError, match=r"holds a bank already: add to it with .*add.* replace it with overwrite"):
        lorakit.export([saved["sql"]], tmp_path / "bank", base_model=base_of())
    with pytest.raises(CheckpointError):
        lorakit.export(["gone"], tmp_path / "bank", base_model=base_of(), overwrite=True)
    assert tree(tmp_path) == before
    bank = lorakit.export([saved["law"]], tmp_path / "bank", base_model=base_of(), overwrite=True)
    assert bank.names == ["law"]
    assert [p.name for p in tmp_path.iterdir()] == ["bank"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_replacement_that_fails_midway_leaves_the_old_bank(saved, tmp_path, monkeypatch, error):
    lorakit.export(saved, tmp_path / "bank", base_model=base_of())
    before = tree(tmp_path)
    replace = os.replace

    def fail(source, target):
        if Path(target).name == "bank.json":
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises((BankError, KeyboardInterrupt)):
            lorakit.export([saved["law"]], tmp_path / "bank", base_model=base_of(), overwrite=True)
    assert tree(tmp_path) == before


def test_a_link_to_a_bank_stays_a_link(saved, tmp_path):
    lorakit.export(saved, tmp_path / "disk" / "bank", base_model=base_of())
    (tmp_path / "bank").symlink_to(tmp_path / "disk" / "bank", target_is_directory=True)
    lorakit.export([saved["law"]], tmp_path / "bank", base_model=base_of(), overwrite=True)
    assert (tmp_path / "bank").is_symlink()
    assert AdapterBank.open(tmp_path / "disk" / "bank").names == ["law"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["bank"]


def test_the_folder_one_is_in_can_be_the_bank(saved, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert lorakit.export(saved, ".", base_model=base_of()).names == list(saved)
    assert lorakit.export([saved["law"]], ".", base_model=base_of(), overwrite=True).names == ["law"]


# Later additions


def test_adding_later_checks_the_base(saved, base_folder, tmp_path):
    bank = lorakit.export([saved["sql"]], tmp_path / "bank", base_model=base_folder)
    bank.add("law", saved["law"])
    other = copy.deepcopy(base_of())
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    before = tree(tmp_path)
    with pytest.raises(BaseModelMismatchError, match="was made for another base model.*the weights of"):
        bank.add("code", saved["code"], base_model=other)
    with pytest.raises(BaseModelMismatchError, match="it was made for a LlamaForCausalLM, this is a GPT2LMHeadModel"):
        bank.add("code", saved["code"], base_model=ARCHITECTURES["gpt2"].build())
    assert tree(tmp_path) == before and bank.names == ["sql", "law"]


def test_configurations_are_kept_as_they_were(runs, tmp_path):
    edit_config(runs["sql"], auto_mapping={"ü": [1, {"x": None}], "\ud800": "\udfff"}, revision="v2")
    config = json.loads((runs["sql"] / CONFIG).read_text())
    bank = lorakit.export([runs["sql"]], tmp_path / "bank", base_model=base_of())
    assert bank["sql"].config == config
    out = AdapterBank.open(tmp_path / "bank").export_peft("sql", tmp_path / "out")
    assert json.loads((out / CONFIG).read_text()) == config
