"""VB-LoRA checkpoints → canonical form."""

import pytest
import torch
from peft import VBLoRAConfig
from peft_folders import WEIGHTS, base_of, edit_config, save, without
from safetensors.torch import load_file
from tenants import check_exact, check_refused, form_of, tenant_with

import lorakit
from lorakit.errors import CheckpointError, LorakitError, ShapeMismatchError, UnsupportedMethodError


def small(**options):
    options = {"r": 3, "num_vectors": 9, "vector_length": 8, "target_modules": ["q_proj", "down_proj"], **options}
    return tenant_with(VBLoRAConfig(**options), spread=0.5)


@pytest.mark.parametrize("only_top", [False, True])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "k_proj", "down_proj"]),
        ("llama", "all-linear"),
        ("gpt2", ["c_attn", "mlp.c_proj"]),
        ("bert", ["query", "output.dense"]),
        ("t5", ["q", "wo"]),
    ],
    ids=str,
)
def test_equals_peft(tmp_path, name, targets, only_top):
    config = VBLoRAConfig(r=3, num_vectors=9, vector_length=4, target_modules=targets, save_only_topk_weights=only_top)
    form = check_exact(tenant_with(config, name, spread=0.5), tmp_path / "tenant", name)
    assert form.method == "vblora" and form.rank == 3 and not form.uses_base_weights


@pytest.mark.parametrize("only_top", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"topk": 1}, {"topk": 4}, {"topk": 9}, {"vector_length": 16}, {"num_vectors": 300}, {"layers_to_transform": 1}],
    ids=str,
)
def test_options(tmp_path, options, only_top):
    check_exact(small(save_only_topk_weights=only_top, **options), tmp_path / "tenant")


def test_a_live_model():
    assert form_of(small(save_only_topk_weights=True)).rank == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"x": 1}, "x")],
    ids=str,
)
def test_options_that_are_refused(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), UnsupportedMethodError, message, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2}, "has shape"),
        ({"r": 2**31 - 1}, "has shape"),
        ({"topk": 10}, "more than the bank's 9"),
        ({"topk": 0}, "topk"),
        ({"topk": 2.0}, "topk"),
        ({"num_vectors": 8}, "vector bank has shape"),
        ({"num_vectors": None}, "num_vectors"),
        ({"vector_length": 5}, "vector bank has shape"),
        ({"save_only_topk_weights": 1}, "save_only_topk_weights"),
        ({"save_only_topk_weights": True}, "not part of a VB-LoRA"),
    ],
    ids=str,
)
def test_values_that_cannot_be(tmp_path, change, message):
    check_refused(save(small(), tmp_path / "tenant"), CheckpointError, message, change)


def test_vectors_that_do_not_divide_the_module(tmp_path):
    folder = save(small(), tmp_path / "tenant")
    edit_config(folder, vector_length=5)
    check_refused(
        folder,
        ShapeMismatchError,
        "vector_length is 5, which does not divide",
        tensors=lambda tensors: tensors.update({"base_model.vblora_vector_bank": torch.ones(9, 5)}),
    )


@pytest.mark.parametrize("part", ["logits_A_topk_indices", "logits_B_topk_weights", "vector_bank"])
def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path, part):
    folder = save(small(save_only_topk_weights=True), tmp_path / "tenant")

    def cut(tensors):
        key = next(key for key in tensors if part in key)
        tensors[key] = tensors[key][1:]

    check_refused(folder, ShapeMismatchError, part.replace("vector_bank", "vector bank"), tensors=cut)
    check_refused(folder, CheckpointError, rf"{part}.*incomplete", tensors=without(part))


@pytest.mark.parametrize(
    ("part", "value"), [("topk_indices", 9), ("topk_indices", 255), ("topk_weights", -1), ("topk_weights", 2)]
)
def test_indices_and_weights_that_cannot_be(tmp_path, part, value):
    check_refused(
        save(small(save_only_topk_weights=True), tmp_path / "tenant"),
        CheckpointError,
        "index out of the bank or a negative weight",
        tensors=lambda tensors: next(t for k, t in tensors.items() if part in k).fill_(value),
    )


@pytest.mark.parametrize("part", ["topk_indices", "topk_weights"])
def test_indices_are_whole_and_weights_are_not(tmp_path, part):
    folder = save(small(save_only_topk_weights=True), tmp_path / "tenant")

    def swap(tensors):
        key = next(key for key in tensors if part in key)
        tensors[key] = tensors[key].to(torch.float32 if part == "topk_indices" else torch.uint8)

    check_refused(folder, CheckpointError, part, tensors=swap)


def test_not_a_number(tmp_path):
    check_refused(
        save(small(save_only_topk_weights=True), tmp_path / "tenant"),
        LorakitError,
        "NaN",
        tensors=lambda tensors: next(t for k, t in tensors.items() if "weights" in k).fill_(float("nan")),
    )


def test_a_bank_gives_it_back(tmp_path):
    folder = save(small(save_only_topk_weights=True, topk=1), tmp_path / "tenant")
    bank = lorakit.export([folder], tmp_path / "bank", base_model=base_of())
    stored, given = load_file(folder / WEIGHTS), load_file(bank.export_peft("tenant", tmp_path / "back") / WEIGHTS)
    assert given.keys() == stored.keys() and all(torch.equal(given[key], stored[key]) for key in stored)
