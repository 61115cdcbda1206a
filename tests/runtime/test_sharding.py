"""Tensor parallelism: two processes with one base give what one process gives, for adapters of every form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import ARCHITECTURES, METHODS, adapt
from mixtures import MIXTURES
from peft import get_peft_model
from processes import shared, together
from torch import distributed

import lorakit
from lorakit import MultiLoraModel
from lorakit.adapters.base import BaseModel
from lorakit.adapters.fingerprint import fingerprint
from lorakit.errors import LorakitError
from lorakit.runtime import ops

pytest.importorskip("transformers.distributed.tensor_parallel")
if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

# One worker has all of them: what the processes give is computed once.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

UNEVEN = "llama-uneven"
FEW = ["dora", "embeddings", "ia3", "biases"]
NAMES = {"llama": None, "llama-tied": FEW, "qwen3": [*FEW, "norms"], "phi3": FEW, UNEVEN: FEW}
"""The bases, and the adapters on each; None: all."""

INVOCATION = [5, 6]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}  # in fp64


def architecture_of(name: str) -> Any:
    if name == UNEVEN:  # 23 and 22
        llama = ARCHITECTURES["llama"]
        return dataclasses.replace(llama, options=llama.options | {"intermediate_size": 45})
    return {**ARCHITECTURES, **MIXTURES}[name]


def tenants_of(name: str, base: Any) -> dict[str, Any]:
    """PEFT models of every form: A and B, c, d, w, of linear modules, norms, embeddings and output layers."""
    architecture, wanted = architecture_of(name), NAMES[name]
    options = {method: make(architecture) for method, make in METHODS.items()}
    options["alora"] = {
        "target_modules": architecture.linear,
        "alora_invocation_tokens": INVOCATION,
        "task_type": "CAUSAL_LM",
    }
    options["few"] = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
    methods = [method for method in options if wanted is None or method in wanted]
    tenants = {method: adapt(base, seed, **options[method]) for seed, method in enumerate(methods)}
    configs = {
        "ia3": peft.IA3Config(target_modules=".*(q_proj|qkv_proj|o_proj|down_proj)", feedforward_modules=[]),
        "norms": peft.LNTuningConfig(target_modules=".*norm"),
    }
    generator = torch.Generator().manual_seed(1)
    for method in [method for method in configs if wanted is None or method in wanted]:
        tenants[method] = get_peft_model(copy.deepcopy(base), configs[method])
        with torch.no_grad():
            for parameter in (one for one in tenants[method].parameters() if one.requires_grad):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return tenants


def answers(model: MultiLoraModel, name: str) -> dict[str, Any]:
    """Logits and greedy tokens of mixed batches, rows of the base among them; and the bytes of each adapter."""
    adapters = sorted(model.adapters)
    mixed = [None, *adapters, adapters[0], None]
    ids = architecture_of(name).inputs(len(mixed), length=9)["input_ids"]
    ids[:, 3:5] = torch.tensor(INVOCATION)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return {
        # With gradients on, as a call has them that nobody has told otherwise.
        "mixed": model(input_ids=ids, adapter_ids=mixed).logits.detach(),
        "alone": model(input_ids=ids[:3], adapter_ids=adapters[0]).logits.detach(),
        "base": model(input_ids=ids[:2]).logits.detach(),
        "tokens": model.generate(input_ids=ids, adapter_ids=mixed, **options),
        "bytes": {key: model.pool.get(model.adapter(key).key).nbytes for key in model.adapters},
    }


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind of the error that a call raises, and what it says."""
    with pytest.raises(LorakitError) as caught:
        call()
    return type(caught.value).__name__, str(caught.value)


def served_by_several(root: Path) -> dict[str, Any]:
    """All that is tested, in each of the processes."""
    found: dict[str, Any] = {}
    for name in NAMES:
        model = MultiLoraModel(shared(root / name / "base"), root / name / "bank")
        found[name] = {"banked": answers(model, name)}
        base = model.model
        # Another model on the same base, whose adapters are converted from its shared weights.
        model = MultiLoraModel(base)
        for folder in sorted((root / name / "adapters").iterdir()):
            model.load_adapter(folder.name, folder)
        found[name]["loaded"] = answers(model, name)
    found["processes"] = model.processes
    found["other bank"] = refusal(lambda: MultiLoraModel(shared(root / "llama-tied" / "base"), root / "llama" / "bank"))
    found["fingerprint"] = fingerprint(BaseModel.of(shared(root / "llama" / "base", torch.float32)))
    experts = MultiLoraModel(shared(root / "qwen3-moe" / "base", torch.float32))
    found["experts"] = refusal(lambda: experts.load_adapter("experts", root / "qwen3-moe" / "adapters" / "experts"))
    found["left"] = experts.adapters
    for method in ("attention", "router"):
        experts.load_adapter(method, root / "qwen3-moe" / "adapters" / method)
    found["mixture"] = logits_of(experts)
    found["another way"] = refusal(lambda: MultiLoraModel(shared_by_hand()))
    found["kernels"] = by_kernels(
        MultiLoraModel(shared(root / "llama" / "base", torch.float32), root / "llama" / "bank")
    )
    return found


@torch.no_grad()
def logits_of(model: MultiLoraModel) -> torch.Tensor:
    """Logits of a mixture with adapters that are not on its experts."""
    ids = architecture_of("qwen3-moe").inputs(4)["input_ids"]
    return model(input_ids=ids, adapter_ids=["attention", None, "router", "attention"]).logits


def shared_by_hand() -> Any:
    """A base of which torch itself has shared a weight out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    base = architecture_of("llama").build()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    base.lm_head.weight = torch.nn.Parameter(distribute_tensor(base.lm_head.weight.detach(), mesh, [Shard(0)]))
    return base


@torch.no_grad()
def by_kernels(model: MultiLoraModel) -> list[torch.Tensor]:
    """Logits by the kernels, which are interpreted without a GPU: the first forward, and one that knows siblings."""
    ids = architecture_of("llama").inputs(2, length=1)["input_ids"]
    has_kernels, ops.has_kernels = ops.has_kernels, lambda *_: True
    try:
        return [model(input_ids=ids, adapter_ids=["few", None]).logits for _ in range(2)]
    finally:
        ops.has_kernels = has_kernels


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def expected(root):
    """By one process, which also writes what the others read."""
    found: dict[str, Any] = {}
    for name in NAMES:
        base, folder = architecture_of(name).build(), root / name
        base.save_pretrained(folder / "base")
        tenants = tenants_of(name, base)
        for method, tenant in tenants.items():
            tenant.save_pretrained(folder / "adapters" / method, save_embedding_layers=False)
        bank = lorakit.export(
            {method: folder / "adapters" / method for method in tenants}, folder / "bank", base_model=base
        )
        found[name] = answers(MultiLoraModel(copy.deepcopy(base).double(), bank), name)
        if name == "llama":
            found["fingerprint"] = bank.fingerprint
            found["kernels"] = by_kernels(MultiLoraModel(base, bank))
    mixture, folder = architecture_of("qwen3-moe").build(), root / "qwen3-moe"
    mixture.save_pretrained(folder / "base")
    options = {
        "experts": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        "attention": {"target_modules": ["q_proj", "k_proj", "o_proj"], "use_dora": True},
        "router": {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]},
    }
    model = MultiLoraModel(copy.deepcopy(mixture))
    for method, one in options.items():
        adapt(mixture, 0, **one).save_pretrained(folder / "adapters" / method)
        model.load_adapter(method, folder / "adapters" / method)
    found["mixture"] = logits_of(model)
    return found


@pytest.fixture(scope="module")
def several(root, expected):
    return together(served_by_several, root)


@pytest.mark.parametrize("way", ["banked", "loaded"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_what_one_gives(expected, several, name, way):
    for found in several:
        mine, theirs = found[name][way], expected[name]
        for what in ("mixed", "alone", "base"):
            torch.testing.assert_close(mine[what], theirs[what], **CLOSE)
            assert torch.equal(mine[what], several[0][name][way][what]), "processes must not drift apart"
        assert torch.equal(mine["tokens"], theirs["tokens"])


def test_a_process_keeps_its_part_alone(expected, several):
    whole = expected["llama"]["bytes"]["lora"]
    for found in several:
        # A of the modules whose outputs are shared out, and B of the others, are whole.
        assert 0.5 * whole < found["llama"]["banked"]["bytes"]["lora"] < 0.8 * whole


@pytest.mark.parametrize("name", NAMES)
def test_shards_have_the_same_size_in_all_processes(several, name):
    """By that they evict alike, and none finds the memory full alone."""
    assert several[0][name]["banked"]["bytes"] == several[1][name]["banked"]["bytes"]


def test_kernels_and_siblings_give_what_one_process_gives(expected, several):
    for found in several:
        for mine, theirs in zip(found["kernels"], expected["kernels"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_shared_base_has_the_fingerprint_of_the_whole(expected, several):
    for found in several:
        assert found["fingerprint"] == expected["fingerprint"]
        assert found["other bank"][0] == "BaseModelMismatchError"
        assert found["processes"] == 2


def test_what_cannot_be_shared_out_is_refused(several):
    for found in several:
        kind, message = found["experts"]
        assert kind == "UnsupportedMethodError"
        assert "mlp.experts" in message and "'experts'" in message and "moe_tp_experts" in message
        assert found["left"] == []
        assert found["another way"][0] == "ConfigError"


def test_beside_experts_that_are_shared_out_adapters_are_served(expected, several):
    for found in several:
        torch.testing.assert_close(found["mixture"], expected["mixture"], rtol=1e-5, atol=1e-5)
