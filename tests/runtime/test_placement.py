"""Modules that are not fed row by row are refused, never guessed at."""

import pytest
import torch
from architectures import ARCHITECTURES, adapt
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    XLNetConfig,
    XLNetLMHeadModel,
)

from lorakit import MultiLoraModel
from lorakit.errors import AdapterIdsError, UnsupportedMethodError
from lorakit.runtime.placement import check_placement

IMAGE_TOKEN = 98


@pytest.fixture(scope="module")
def llava():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=99, pad_token_id=0)
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def test_the_language_model_of_a_multimodal_base_is_served(llava):
    tenant = adapt(llava, 0, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)|lm_head")
    model = MultiLoraModel(llava)
    model.load_adapter("tenant", tenant)
    ids = torch.randint(3, 90, (2, 9))
    ids[0, 1:5] = IMAGE_TOKEN  # one image, in the first row only
    pixels = torch.randn(1, 3, 8, 8)
    mixed = model(input_ids=ids, pixel_values=pixels, adapter_ids=[None, "tenant"]).logits
    torch.testing.assert_close(mixed[1:], tenant(input_ids=ids[1:]).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[:1], llava(input_ids=ids[:1], pixel_values=pixels).logits, rtol=1e-5, atol=1e-5)


def test_a_tower_is_refused_where_nobody_can_tell_whose_an_image_is(llava, monkeypatch):
    monkeypatch.setattr(llava.config, "model_type", "llava_of_tomorrow")
    tenant = adapt(llava, 0, target_modules=["q_proj"])
    model = MultiLoraModel(llava)
    model.load_adapter("tenant", tenant)
    ids = torch.randint(3, 90, (2, 9))
    with pytest.raises(UnsupportedMethodError, match=r"vision_tower.*llava_of_tomorrow.*language model alone"):
        model(input_ids=ids, adapter_ids=["tenant", None])


@torch.no_grad()
def test_a_batch_of_one_adapter_is_served_wherever_it_sits(llava):
    tenant = adapt(llava, 0, target_modules=["q_proj", "fc1", "linear_2"])
    model = MultiLoraModel(llava)
    model.load_adapter("tenant", tenant)
    ids = torch.randint(3, 90, (3, 9))
    ids[0, 1:5] = ids[1, 0:4] = IMAGE_TOKEN
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    mine = model(**inputs, adapter_ids="tenant").logits
    torch.testing.assert_close(mine, tenant(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_model_that_lays_tokens_out_by_position_is_refused():
    config = XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16)
    base = XLNetLMHeadModel(config).eval()
    model = MultiLoraModel(base)
    model.load_adapter("tenant", adapt(base, 0, target_modules=["layer_1"]))
    with pytest.raises(UnsupportedMethodError, match="position by position"):
        model(input_ids=torch.randint(0, 50, (4, 4)), adapter_ids=["tenant", None, None, None])


@torch.no_grad()
def test_a_position_embedding_is_refused_in_a_mixed_batch():
    """It is looked up once for all rows: there is no row to select."""
    gpt2 = ARCHITECTURES["gpt2"]
    base = gpt2.build()
    model = MultiLoraModel(base)
    tenant = adapt(base, 0, target_modules=["wpe"])
    model.load_adapter("tenant", tenant)
    inputs = gpt2.inputs(3)
    with pytest.raises(AdapterIdsError, match=r"wpe.*one adapter"):
        model(**inputs, adapter_ids=["tenant", None, None])
    mine = model(**inputs, adapter_ids="tenant").logits
    torch.testing.assert_close(mine, tenant(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["model.layers.0.block_sparse_moe.experts.3.w1", "experts.0.up_proj", "x.expert.1.y"])
def test_single_experts_are_refused(llava, path):
    with pytest.raises(UnsupportedMethodError, match="router's order"):
        check_placement(llava, path)


def test_experts_of_one_modality_are_refused(llava):
    """Ernie 4.5 VL's."""
    with pytest.raises(UnsupportedMethodError, match="one modality's tokens"):
        check_placement(llava, "model.language_model.layers.1.mlp.text_moe.experts")


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("switch_transformers", "encoder.block.1.layer.1.mlp.experts.expert_0.wi"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w1"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("longformer", "longformer.encoder.layer.0.attention.self.query"),
        ("led", "led.encoder.layers.0.self_attn.longformer_self_attn.query"),
        ("fsmt", "model.decoder.layers.0.fc1"),
    ],
)
def test_what_is_known_to_lie_otherwise_is_refused_by_name(model_type, path):
    model = torch.nn.Module()
    model.config = PretrainedConfig()
    model.config.model_type = model_type
    with pytest.raises(UnsupportedMethodError, match="cannot share a batch"):
        check_placement(model, path)
