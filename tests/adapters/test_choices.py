"""What a user chooses of a conversion: given to every way in, kept in the bank, given back."""

import copy
import json

import pytest
import torch
from peft import HiraConfig, LoraConfig, PolyConfig
from peft_folders import WEIGHTS, base_of, save
from safetensors.torch import load_file
from tenants import form_of, tenant_with

import lorakit
from lorakit import AdapterBank, MultiLoraModel
from lorakit.adapters.choices import Choices, choices_of
from lorakit.errors import BankError, ConfigError, UnsupportedMethodError

TARGETS = {"target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A method of full rank, one of several tasks, and one that leaves nothing open."""
    root = tmp_path_factory.mktemp("runs")
    configs = {
        "hira": HiraConfig(r=4, **TARGETS),
        "poly": PolyConfig(r=4, n_tasks=3, **TARGETS),
        "lora": LoraConfig(r=4, init_lora_weights=False, **TARGETS),
    }
    return {name: save(tenant_with(config), root / name) for name, config in configs.items()}


@pytest.fixture
def bank(runs, tmp_path):
    return lorakit.export(runs, tmp_path / "bank", base_model=base_of(), svd_energy=0.9, task_ids={"poly": 2})


def test_the_bank_says_what_was_chosen_and_lost(runs, bank):
    expected = form_of(runs["hira"], svd_energy=0.9)
    for opened in (bank, AdapterBank.open(bank.path)):
        entry = opened["hira"]
        assert entry.svd_errors == pytest.approx(expected.svd_errors, rel=1e-3)
        assert entry.svd_error == max(entry.svd_errors.values()) > 0.1
        assert opened["poly"].task_id == 2 and opened["hira"].task_id is None
        assert opened["lora"].svd_errors == {} and opened["lora"].svd_error == 0
        assert opened.form("hira").svd_errors == entry.svd_errors and opened.form("poly").task_id == 2
    assert bank["hira"] == AdapterBank.open(bank.path)["hira"]
    bank.verify()
    for name, module in form_of(runs["poly"], task_id=2).modules.items():
        assert torch.equal(bank.form("poly").modules[name].a, module.a)


def test_what_is_exact_is_as_without_a_choice(runs, bank, tmp_path):
    plain = lorakit.export({"lora": runs["lora"]}, tmp_path / "plain", base_model=base_of())
    assert plain["lora"].sha256 == bank["lora"].sha256
    entry = json.loads((plain.path / "bank.json").read_text())["adapters"]["lora"]
    assert "svd_errors" not in entry and "task_id" not in entry


def test_checkpoints_come_back_bit_for_bit(runs, bank, tmp_path):
    for name, folder in runs.items():
        before = load_file(folder / WEIGHTS)
        after = load_file(bank.export_peft(name, tmp_path / "out" / name) / WEIGHTS)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_add_and_compact_keep_them(runs, bank):
    bank.add("task-1", runs["poly"], base_model=base_of(), task_id=1)
    bank.add("rough", runs["hira"], base_model=base_of(), svd_energy=0.5)
    bank.add_all({"task-0": runs["poly"]}, base_model=base_of(), task_ids={"task-0": 0})
    assert [bank[name].task_id for name in ("poly", "task-1", "task-0")] == [2, 1, 0]
    assert bank["rough"].svd_error > bank["hira"].svd_error and bank["rough"].rank < bank["hira"].rank
    before = bank["hira"].svd_errors
    bank.remove("lora")
    bank.compact()
    assert bank["hira"].svd_errors == before and AdapterBank.open(bank.path)["hira"].svd_errors == before


@torch.no_grad()
def test_a_live_model_takes_them(runs, bank):
    model = MultiLoraModel(copy.deepcopy(base_of()), bank)
    model.load_adapter("hira-now", runs["hira"], svd_energy=0.9)
    model.load_adapter("poly-now", runs["poly"], task_id=2)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]] * 2)}
    for name in ("hira", "poly"):
        rows = model(**inputs, adapter_ids=[name, f"{name}-now"]).logits
        torch.testing.assert_close(rows[0], rows[1])
    with pytest.raises(ConfigError, match="'hira' is converted already; svd_energy and task_id need a source"):
        model.load_adapter("hira", svd_energy=0.9)
    with pytest.raises(UnsupportedMethodError, match="export with svd_energy=0.999"):
        model.load_adapter("another", runs["hira"])


@pytest.mark.parametrize("energy", [0, 1.1, -1, True, "0.9", float("nan"), float("inf"), [], 10**400])
def test_shares_that_cannot_be(runs, tmp_path, energy):
    with pytest.raises(ConfigError, match="svd_energy is .*; give a number above 0, and of at most 1"):
        lorakit.export(runs, tmp_path / "bank", base_model=base_of(), svd_energy=energy)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("task", [-1, True, 1.0, "1", 1 << 31])
def test_tasks_that_cannot_be(task):
    with pytest.raises(ConfigError, match="task_id is .*; give a task's number"):
        choices_of(["a"], task_ids={"a": task})


def test_tasks_of_adapters_that_are_not_there_or_have_none(runs, tmp_path):
    with pytest.raises(ConfigError, match="task_ids names 'sql', which is none of the adapters: hira, poly, lora"):
        lorakit.export(runs, tmp_path / "bank", base_model=base_of(), task_ids={"sql": 1})
    with pytest.raises(ConfigError, match=r'task_ids is 2; give a mapping from adapters to tasks, as \{"sql": 2\}'):
        lorakit.export(runs, tmp_path / "bank", base_model=base_of(), task_ids=2)
    with pytest.raises(ConfigError, match="lora: task_id=1 was chosen, but a LORA has no tasks; leave it out"):
        form_of(runs["lora"], task_id=1)


def test_a_number_is_taken_as_it_is():
    assert Choices(svd_energy=1) == Choices(svd_energy=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("svd_errors", {}),
        ("svd_errors", [0.1]),
        ("svd_errors", [-0.1] * 4),
        ("svd_errors", ["0.1"] * 4),
        ("svd_errors", [True] * 4),
        ("svd_errors", [float("nan")] * 4),
        ("svd_errors", None),
        ("task_id", -1),
        ("task_id", 1 << 31),
        ("task_id", "2"),
        ("task_id", None),
    ],
    ids=str,
)
def test_damage_in_the_index(bank, field, value):
    path = bank.path / "bank.json"
    index = json.loads(path.read_text())
    index["adapters"]["hira"][field] = value
    path.write_text(json.dumps(index))
    with pytest.raises(BankError, match=field):
        AdapterBank.open(bank.path)
