"""Poly checkpoints → canonical form."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel, PolyConfig
from peft_folders import base_of, edit_config, key_of, relative, save, without
from safetensors.torch import load_file
from tenants import WEIGHTS, check_refused, form_of, tenant_with

from lorakit import MultiLoraModel
from lorakit.adapters.methods import restore
from lorakit.errors import CheckpointError, ConfigError, ShapeMismatchError, UnsupportedMethodError


def config_of(**options):
    return PolyConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"n_skills": 1}),
        ("llama", {"n_skills": 3, "n_splits": 4, "r": 5}),
        ("llama", {"n_splits": 2, "target_modules": ["k_proj", "up_proj", "down_proj"]}),
        ("llama", {"init_weights": False}),
        ("bert", {"target_modules": ["query", "value"], "n_splits": 2}),
        ("t5", {"target_modules": ["q", "wo"]}),
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_peft(tmp_path, name, options):
    folder = save(tenant_with(config_of(**options), name, spread=0.5), tmp_path / "tenant")
    reference = PeftModel.from_pretrained(copy.deepcopy(base_of(name)), folder).eval().double()
    inputs = ARCHITECTURES[name].inputs(2)
    # PeftModel itself passes the task on for some task types only.
    expected = reference.base_model(**inputs, task_ids=torch.tensor([0, 0])).logits
    plain = base_of(name)(**inputs).logits
    assert relative(plain, expected) > 1e-3
    model = MultiLoraModel(copy.deepcopy(base_of(name)))
    model.load_adapter("tenant", folder)
    mixed = model(**inputs, adapter_ids=["tenant", None]).logits
    assert relative(mixed[0], expected[0]) <= 2e-5
    assert relative(mixed[1], plain[1]) <= 1e-6
    assert relative(model(**inputs, adapter_ids="tenant").logits, expected) <= 2e-5
    form = form_of(folder, name)
    assert form.method == "poly" and form.rank == options.get("r", 4) and not form.uses_base_weights
    stored, given = load_file(folder / WEIGHTS), restore(form)
    assert given.keys() == stored.keys()
    assert all(torch.equal(given[key], stored[key]) for key in stored)


@pytest.fixture
def folder(tmp_path):
    return save(tenant_with(config_of()), tmp_path / "tenant")


@pytest.mark.parametrize(("name", "options"), [("llama", {"n_skills": 3, "n_splits": 2}), ("t5", {"targets": "q"})])
@torch.no_grad()
def test_every_task_of_several_equals_peft(tmp_path, name, options):
    target = options.pop("targets", "down_proj")
    tenant = tenant_with(config_of(n_tasks=3, target_modules=[target], **options), name, spread=0.5)
    folder = save(tenant, tmp_path / "tenant")
    reference = PeftModel.from_pretrained(copy.deepcopy(base_of(name)), folder).eval().double()
    inputs = ARCHITECTURES[name].inputs(2)
    model = MultiLoraModel(copy.deepcopy(base_of(name)))
    for task in range(3):
        model.load_adapter(f"task-{task}", folder, task_id=task)
    plain = base_of(name)(**inputs).logits
    expected = [reference.base_model(**inputs, task_ids=torch.tensor([task, task])).logits for task in range(3)]
    for task in range(3):
        assert relative(expected[task], expected[task - 1]) > 1e-3, "the tasks are the same, so nothing is tested"
        mixed = model(**inputs, adapter_ids=[f"task-{task}", None]).logits
        assert relative(mixed[0], expected[task][0]) <= 2e-5
        assert relative(mixed[1], plain[1]) <= 1e-6
    mixed = model(**inputs, adapter_ids=["task-2", "task-0"]).logits
    assert relative(mixed[0], expected[2][0]) <= 2e-5 and relative(mixed[1], expected[0][1]) <= 2e-5
    form = form_of(folder, name, task_id=2)
    assert form.task_id == 2
    stored, given = load_file(folder / WEIGHTS), restore(form)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)


def test_several_tasks_and_none_chosen(tmp_path):
    folder = save(tenant_with(config_of(n_tasks=3)), tmp_path / "tenant")
    with pytest.raises(UnsupportedMethodError, match="this POLY has 3 tasks.* choose one by its task_id, 0 to 2"):
        form_of(folder)
    with pytest.raises(ConfigError, match="tenant: task_id=3 was chosen, but this POLY has 3 tasks, 0 to 2"):
        form_of(folder, task_id=3)


def test_the_only_task_may_be_named(folder):
    assert form_of(folder, task_id=0).task_id is None
    with pytest.raises(ConfigError, match="task_id=1 was chosen, but this POLY has 1 task, 0"):
        form_of(folder, task_id=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "4"},
        {"r": None},
        {"n_tasks": 0},
        {"n_tasks": True},
        {"n_tasks": ...},
        {"n_skills": 10**30},
        {"n_skills": 2.0},
        {"n_splits": []},
        {"n_splits": 5},
        {"poly_type": "mhr"},
        {"poly_type": ["poly"]},
        {"target_modules": 3},
    ],
    ids=str,
)
def test_bad_values_in_the_configuration(folder, changes):
    check_refused(folder, CheckpointError, rf"tenant: .*{next(iter(changes))}", changes)


@pytest.mark.parametrize("changes", [{"routes": True}], ids=str)
def test_options_that_are_not_served(folder, changes):
    check_refused(folder, UnsupportedMethodError, next(iter(changes)), changes)


@pytest.mark.parametrize("item", ["poly_lora_A", "poly_lora_B", "poly_router.module_logits"])
def test_tensors_that_are_missing_or_of_another_shape(folder, item):
    def cut(tensors):
        key = key_of(tensors, "0.mlp.down_proj", item)
        tensors[key] = tensors[key][..., :-1]

    check_refused(folder, ShapeMismatchError, rf"tenant: {item} of model.layers.0.mlp.down_proj has shape", tensors=cut)
    check_refused(
        folder,
        CheckpointError,
        rf"model.layers.0.mlp.down_proj has no {item}",
        tensors=without("0.mlp.down_proj", item),
    )


@pytest.mark.parametrize("changes", [{"r": 5}, {"n_skills": 3}, {"n_splits": 2}], ids=str)
def test_a_configuration_of_other_sizes(folder, changes):
    check_refused(folder, ShapeMismatchError, "tenant: poly_lora_A of", changes)


def test_a_conv1d_is_refused_as_by_peft(folder):
    edit_config(folder, target_modules=["c_attn"])

    def move(tensors):
        for key in list(tensors):
            tensor = tensors.pop(key)
            if "q_proj" in key:
                moved = key.replace("model.model.layers", "model.transformer.h")
                tensors[moved.replace("self_attn.q_proj", "attn.c_attn")] = tensor

    check_refused(
        folder, UnsupportedMethodError, "no POLY for .*c_attn, which is no nn.Linear", tensors=move, name="gpt2"
    )
