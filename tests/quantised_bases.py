"""Tiny random Llamas, quantised in each way that is served; made here, without calibration and without network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCAB = 101
GROUP = 32  # inputs that share a scale


@cache
def plain() -> LlamaForCausalLM:
    """The base before it is quantised, in float32, with biases in the attention.

    Its widths are multiples of 128, as the kernels of some kinds want them, and larger, as torchao takes a scale for
    128 inputs for another kind than one for all of them.
    """
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(3 * noise if name.endswith("bias") else 1 + 0.1 * noise)
    return model


def inputs(rows: int, device: str) -> dict[str, torch.Tensor]:
    """A batch of random ids."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, VOCAB, (rows, 7), generator=generator).to(device)}


@dataclass(frozen=True)
class Kind:
    """A way of quantising.

    Attributes:
        packages: what it needs.
        load: folder for files, device → the quantised model.
        name: what the bank calls it.
        gpu: it has no kernels for the CPU.
        unpacks: it is unpacked there, where checkpoints are read.
        dora: PEFT has DoRA on it.
        saved: a folder of it can be read by transformers.
        tolerance: of the logits beside PEFT's on the same base, relative.
        rows: how far a row of the base may be from itself in another batch, relative.
        product: how far a layer's product may be from one with the dequantised weight, relative: zero but for
            rounding, unless the layer quantises its inputs too.
    """

    packages: tuple[str, ...]
    load: Callable[[Path, str], PreTrainedModel]
    name: str
    gpu: bool = False
    unpacks: bool = True
    dora: bool = True
    saved: bool = True
    tolerance: float = 2e-5
    rows: float = 0.0
    product: float = 1e-5

    def __call__(self, folder: Path, device: str) -> PreTrainedModel:
        """The model, or a skipped test."""
        for package in self.packages:
            pytest.importorskip(package)
        if self.gpu and device == "cpu":
            pytest.skip("has no kernels for the CPU")
        return self.load(folder, device).eval()


def _by_transformers(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Callable[..., PreTrainedModel]:
    """Quantised while it is loaded, by a configuration of transformers'."""

    def load(folder: Path, device: str) -> PreTrainedModel:
        if not (folder / "plain").exists():
            plain().save_pretrained(folder / "plain")
        place = {"": 0 if device == "cuda" else device}
        return LlamaForCausalLM.from_pretrained(
            folder / "plain", quantization_config=make(), dtype=dtype, device_map=place
        )

    return load


def _torchao(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torchao.quantization as quantization

        given = {
            key: getattr(quantization, value)(*[GROUP] * (value == "PerGroup")) if key == "granularity" else value
            for key, value in options.items()
        }
        return transformers.TorchAoConfig(getattr(quantization, name)(**given))

    return make


def _hqq(bits: int) -> Callable[..., PreTrainedModel]:
    """As HQQ's own library does it; transformers 5 refuses HQQ for now ("not available yet")."""

    def load(folder: Path, device: str) -> PreTrainedModel:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        model = LlamaForCausalLM(plain().config)
        model.load_state_dict(plain().state_dict())
        options = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                layer = HQQLinear(module, options, compute_dtype=torch.float32, device=device)
                model.set_submodule(path, layer)
        return model.to(device)

    return load


def _packed_by_hand(method: str, config: Mapping[str, Any]) -> Callable[..., PreTrainedModel]:
    """A checkpoint in GPTQ's or AWQ's format with weights rounded to the nearest, loaded by transformers."""

    def load(folder: Path, device: str) -> PreTrainedModel:
        if not (folder / method).exists():
            _write(folder / method, method, config)
        place = {"": 0 if device == "cuda" else device}
        return LlamaForCausalLM.from_pretrained(folder / method, dtype=torch.float16, device_map=place)

    return load


def _write(folder: Path, method: str, config: Mapping[str, Any]) -> None:
    tensors = {}
    for name, tensor in plain().state_dict().items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor.half()
            continue
        codes, zeros, scales = (part.T for part in round_to_groups(tensor))
        path = name.removesuffix("weight")
        tensors[f"{path}scales"] = scales.half()
        if method == "gptq":
            tensors[f"{path}qweight"] = _pack(codes, 0, range(8))
            tensors[f"{path}qzeros"] = _pack(zeros - 1, 1, range(8))  # its first format stores one less
            tensors[f"{path}g_idx"] = torch.arange(tensor.shape[1], dtype=torch.int32) // GROUP
        else:
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            tensors[f"{path}qweight"] = _pack(codes, 1, order)
            tensors[f"{path}qzeros"] = _pack(zeros, 1, order)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    options = {"quant_method": method, "bits": 4, "group_size": GROUP, **config}
    text = {**plain().config.to_dict(), "dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**text, "quantization_config": options}))


def round_to_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 … 15 (out, in), zero points and scales (out, in / GROUP): W ≈ (codes − zeros) · scales."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = torch.round(-low / scales).clamp(1, 15)
    codes = torch.round(groups / scales[..., None] + zeros[..., None]).clamp(0, 15)
    return codes.flatten(1).long(), zeros.long(), scales


def _pack(codes: torch.Tensor, dim: int, order: Any) -> torch.Tensor:
    """Eight codes of four bits an int32, the first in the lowest bits."""
    eights = codes.movedim(dim, -1).unflatten(-1, (-1, 8))
    packed = sum(eights[..., place] << (4 * bit) for bit, place in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int().movedim(-1, dim)


def _bitsandbytes(**options: Any) -> Callable[[], Any]:
    return lambda: transformers.BitsAndBytesConfig(**options)


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def _in_bfloat16(load: Callable[..., PreTrainedModel], used: bool) -> Callable[..., PreTrainedModel]:
    """bitsandbytes' 4 bits with or without what it does on CPUs that multiply in bfloat16."""

    def loaded(folder: Path, device: str) -> PreTrainedModel:
        model = load(folder, device)
        layers = [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
        if used and not (device == "cpu" and layers and all(layer.support_avx512bf16_for_cpu for layer in layers)):
            pytest.skip("this is no CPU that multiplies in bfloat16")
        for layer in layers:
            layer.support_avx512bf16_for_cpu = used
        return model

    return loaded


_HALF = 2e-3  # of float16 and bfloat16, where a sum in another order is another sum
_DYNAMIC = 0.03  # the layers round their inputs too, and a last bit more or less there moves a whole step

KINDS = {
    "bitsandbytes-nf4": Kind(
        ("bitsandbytes",), _in_bfloat16(_by_transformers(_bitsandbytes(**_NF4)), False), "bitsandbytes 4-bit nf4"
    ),
    "bitsandbytes-double": Kind(
        ("bitsandbytes",),
        _in_bfloat16(_by_transformers(_bitsandbytes(**_NF4, bnb_4bit_use_double_quant=True)), False),
        "bitsandbytes 4-bit nf4 double",
    ),
    "bitsandbytes-nf4-bfloat16": Kind(
        ("bitsandbytes",),
        _in_bfloat16(_by_transformers(_bitsandbytes(**_NF4)), True),
        "bitsandbytes 4-bit nf4",
        dora=False,  # PEFT reads the weight as if it lay in its first order
        tolerance=5 * _HALF,
        product=2 * _HALF,
        rows=5 * _HALF,
    ),
    # Without its outliers, which are columns of a whole batch: so that a row does not depend on the others there.
    "bitsandbytes-int8": Kind(
        ("bitsandbytes",),
        _by_transformers(_bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0), torch.float16),
        "bitsandbytes 8-bit",
        tolerance=_DYNAMIC,
        product=_DYNAMIC,
    ),
    "torchao-int8": Kind(
        ("torchao",), _by_transformers(_torchao("Int8WeightOnlyConfig")), "torchao Int8WeightOnlyConfig"
    ),
    "torchao-int8-dynamic": Kind(
        ("torchao",),
        _by_transformers(_torchao("Int8DynamicActivationInt8WeightConfig")),
        "torchao Int8DynamicActivationInt8WeightConfig",
        tolerance=_DYNAMIC,
        product=_DYNAMIC,
    ),
    "torchao-int4": Kind(
        ("torchao",),
        _by_transformers(_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity="PerGroup")),
        "torchao IntxWeightOnlyConfig int4 group 32",
    ),
    "torchao-int4-tiles": Kind(
        ("torchao",),
        _by_transformers(
            _torchao("Int4WeightOnlyConfig", group_size=GROUP, int4_packing_format="tile_packed_to_4d"), torch.bfloat16
        ),
        "torchao Int4WeightOnlyConfig group 32",
        gpu=True,
        unpacks=False,
        dora=False,
        tolerance=0.02,
        product=0.02,
    ),
    "torchao-fp8": Kind(
        ("torchao",),
        _by_transformers(_torchao("Float8WeightOnlyConfig")),
        "torchao Float8WeightOnlyConfig float8_e4m3fn",
    ),
    "torchao-fp8-dynamic": Kind(
        ("torchao",),
        _by_transformers(_torchao("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"), torch.bfloat16),
        "torchao Float8DynamicActivationFloat8WeightConfig float8_e4m3fn",
        gpu=True,
        tolerance=0.08,
        product=0.05,
    ),
    "quanto-int8": Kind(
        ("optimum.quanto",),
        _by_transformers(lambda: transformers.QuantoConfig(weights="int8")),
        "quanto int8",
        saved=False,
    ),
    "quanto-int4": Kind(
        ("optimum.quanto",),
        _by_transformers(lambda: transformers.QuantoConfig(weights="int4")),
        "quanto int4",
        saved=False,
    ),
    "hqq-8": Kind(("hqq",), _hqq(8), "hqq 8-bit group 32", saved=False),
    "hqq-4": Kind(("hqq",), _hqq(4), "hqq 4-bit group 32", saved=False),
    "gptq": Kind(
        ("gptqmodel", "optimum"),
        _packed_by_hand("gptq", {"desc_act": False, "sym": False, "checkpoint_format": "gptq"}),
        "gptq 4-bit group 32",
        dora=False,
        tolerance=_HALF,
        rows=_HALF,  # on a GPU its kernel adds up in no fixed order
        product=_HALF,
    ),
    "awq": Kind(
        ("gptqmodel",),
        _packed_by_hand("awq", {"zero_point": True, "version": "gemm"}),
        "awq 4-bit group 32",
        dora=False,
        tolerance=_HALF,
        product=_HALF,
    ),
}
