"""Tiny random multimodal models, adapters all over them, and batches whose rows have any number of images."""

from functools import cache

import torch
import transformers
from architectures import adapt

from lorakit import MultiLoraModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1}
PATCH = {"patch_size": 4}
TILED = ("idefics3", "smolvlm")
GRIDS = ("qwen2_vl", "qwen2_5_vl")
IMAGE, VIDEO, START, END = 98, 97, 96, 95
LINEAR = "q_proj k_proj v_proj qkv attn.proj fc1 fc2 down_proj".split()
TARGETS = [*LINEAR, "linear_1", "linear_2", "mlp.0", "mlp.2", "modality_projection.proj", "linear"]


def llava():
    vision = transformers.CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=16)
    text = transformers.LlamaConfig(**TEXT, eos_token_id=None)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    vision = transformers.SiglipVisionConfig(**SIZES, image_size=8, patch_size=4)
    text = transformers.Gemma3TextConfig(**TEXT, head_dim=8, query_pre_attn_scalar=8, eos_token_id=None)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def shuffled(name):
    def build():
        options = {"scale_factor": 2, "image_token_id": IMAGE, "vision_config": {**SIZES, "image_size": 16} | PATCH}
        text = transformers.LlamaConfig(**TEXT, eos_token_id=None)
        config = getattr(transformers, f"{name}Config")(text_config=text, **options)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


def qwen(name):
    def build():
        text = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "eos_token_id": None}
        vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        if name == "Qwen2VL":
            vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
            vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
        tokens |= {"vision_start_token_id": START, "vision_end_token_id": END}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **tokens)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)

    return build


def qwen2_audio():
    audio = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    audio |= {"d_model": 32, "max_source_positions": 16}
    text = {**TEXT, "model_type": "qwen2", "eos_token_id": None}
    config = transformers.Qwen2AudioConfig(
        audio_config=audio | {"model_type": "qwen2_audio_encoder"}, text_config=text, audio_token_index=IMAGE
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


BUILD = {
    "llava": llava,
    "gemma3": gemma3,
    "idefics3": shuffled("Idefics3"),
    "smolvlm": shuffled("SmolVLM"),
    "qwen2_vl": qwen("Qwen2VL"),
    "qwen2_5_vl": qwen("Qwen2_5_VL"),
    "qwen2_audio": qwen2_audio,
}


@cache
def family(name):
    torch.manual_seed(0)
    base = BUILD[name]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # some towers begin with zeros or tiny numbers
        for parameter in base.parameters():
            spread = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + spread if parameter.dim() == 1 else spread)
    tenants = {str(seed): adapt(base, seed, target_modules=TARGETS) for seed in range(2)}
    model = MultiLoraModel(base)
    for tenant in tenants:
        model.load_adapter(tenant, tenants[tenant])
    return base, tenants, model


def image_size(name, image):
    """Placeholders of an image; a Qwen's are of three sizes."""
    return [4, 6, 2][image % 3] if name in GRIDS else 4


def inputs_of(name, images):
    """A batch whose rows have these numbers of images, and each row alone."""
    generator = torch.Generator().manual_seed(2)
    rows, first = [], 0
    for row, count in enumerate(images):
        ids = [3 + row, 4]
        given = {"pixels": [], "grid": []}
        for image in range(first, first + count):
            size = image_size(name, image)
            ids += [START, *[IMAGE] * size, END, 7 + image]
            if name in GRIDS:
                given["pixels"].append(torch.randn(4 * size, 3 * 2 * 4 * 4, generator=generator))
                given["grid"].append([1, 4 if size != 6 else 6, 4 if size != 2 else 2])
            else:
                side = 16 if name in TILED else 8
                given["pixels"].append(torch.randn(1, 3, side, side, generator=generator))
        first += count
        rows.append(([*ids, 8, 9 + row], given))
    longest = max(len(ids) for ids, _ in rows)

    def packed(some, most):
        padded = [[0] * (longest - len(ids)) + ids for ids, _ in some]
        ids = torch.tensor(padded)
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        pixels = [one for _, given in some for one in given["pixels"]]
        if not pixels:
            return inputs
        if name in TILED:
            blank = torch.zeros(1, 3, 16, 16)
            pixels = [torch.cat(given["pixels"] + [blank] * (most - len(given["pixels"]))) for _, given in some]
            return {**inputs, "pixel_values": torch.stack(pixels)}
        inputs["pixel_values"] = torch.cat(pixels)
        if name == "gemma3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
        if name in GRIDS:
            inputs["image_grid_thw"] = torch.tensor([one for _, given in some for one in given["grid"]])
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        return inputs

    return packed(rows, max(images)), [packed([row], max(1, len(row[1]["pixels"]))) for row in rows]
