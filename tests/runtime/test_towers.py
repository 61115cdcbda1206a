"""Vision and audio towers in a mixed batch: each image by its own row's adapter, against PEFT's row alone."""

import pytest
import torch
import transformers
from architectures import adapt
from vision import IMAGE, VIDEO, family, inputs_of

from lorakit import MultiLoraModel
from lorakit.errors import AdapterIdsError, UnsupportedMethodError
from lorakit.runtime import ops

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(name, inputs, alone, ids):
    base, tenants, model = family(name)
    with torch.no_grad():
        mixed = model(**inputs, adapter_ids=ids).logits
    for row, tenant in enumerate(ids):
        with torch.no_grad():
            expected = (tenants[tenant] if tenant else base)(**alone[row]).logits[0]
            plain = base(**alone[row]).logits[0]
        keep = alone[row]["attention_mask"][0].bool()
        assert relative(mixed[row][keep], expected[keep]) <= 2e-5, row
        assert tenant is None or relative(plain[keep], expected[keep]) > 1e-2


VISION = ["llava", "gemma3", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"]


@pytest.mark.parametrize("images", [[1, 2, 0, 3], [2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("name", VISION)
def test_each_image_by_its_own_rows_adapter(name, images):
    inputs, alone = inputs_of(name, images)
    check(name, inputs, alone, ["0", "1", "1", None])
    _, _, model = family(name)
    paths = {path for batch in model._adapted.last.batches[1:] for path in batch.paths}
    assert any("vision" in path or "visual" in path for path in paths)
    assert any("connector" in path or "projector" in path or "merger" in path for path in paths) or name == "gemma3"


@pytest.mark.parametrize("name", VISION)
def test_a_batch_without_images(name):
    inputs, alone = inputs_of(name, [0, 0])
    check(name, inputs, alone, ["0", None])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", VISION)
def test_generated_tokens_equal_pefts(name, options):
    # transformers itself mixes up beams where a row has several images, but for Qwen's.
    images = [1, 1, 1] if options and not name.startswith("qwen") else [1, 2, 1]
    base, tenants, model = family(name)
    inputs, alone = inputs_of(name, images)
    ids = ["1", "0", None]
    mixed = model.generate(**inputs, adapter_ids=ids, **GREEDY, **options)
    for row, tenant in enumerate(ids):
        expected = (tenants[tenant] if tenant else base).generate(**alone[row], **GREEDY, **options)
        assert torch.equal(mixed[row], expected[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_videos(name):
    def as_videos(inputs):
        ids = torch.where(inputs["input_ids"] == IMAGE, VIDEO, inputs["input_ids"])
        videos = {"pixel_values_videos": inputs["pixel_values"], "video_grid_thw": inputs["image_grid_thw"]}
        kinds = {"mm_token_type_ids": 2 * inputs["mm_token_type_ids"]}
        return {"input_ids": ids, "attention_mask": inputs["attention_mask"], **videos, **kinds}

    inputs, alone = inputs_of(name, [2, 1, 1])
    check(name, as_videos(inputs), [as_videos(one) for one in alone], ["1", "0", None])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_kernels_serve_towers_alike(monkeypatch, name):
    inputs, _ = inputs_of(name, [1, 2, 0])
    _, _, model = family(name)
    ids = ["0", "1", None]
    expected = model(**inputs, adapter_ids=ids).logits
    monkeypatch.setattr(ops, "has_kernels", lambda device, dtype: True)
    assert relative(model(**inputs, adapter_ids=ids).logits, expected) <= 1e-5


@torch.no_grad()
def test_a_sound_a_row():
    base, tenants, model = family("qwen2_audio")
    ids = torch.tensor([[3, 4, *[IMAGE] * 8, 5, 6]] * 3)
    sounds = torch.randn(3, 8, 32)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"input_features": sounds, "feature_attention_mask": torch.ones(3, 32, dtype=torch.long)}
    names = ["1", None, "0"]
    mixed = model(**inputs, adapter_ids=names).logits
    for row, tenant in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        assert relative(mixed[row], (tenants[tenant] if tenant else base)(**one).logits[0]) <= 2e-5
    ids[1, 2:10] = 7
    with pytest.raises(AdapterIdsError, match="which row each sound belongs to"):
        model(**inputs, adapter_ids=names)


@torch.no_grad()
def test_whispers_encoder_is_given_rows():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "vocab_size": 101}
    sizes |= {"max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    base = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**sizes, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)
    ).eval()
    tenants = [adapt(base, seed, target_modules=["q_proj", "fc1", "out_proj"]) for seed in range(2)]
    model = MultiLoraModel(base)
    for seed, tenant in enumerate(tenants):
        model.load_adapter(str(seed), tenant)
    inputs = {"input_features": torch.randn(3, 8, 32), "decoder_input_ids": torch.randint(3, 90, (3, 4))}
    mixed = model(**inputs, adapter_ids=["1", None, "0"]).logits
    for row, one in enumerate((tenants[1], base, tenants[0])):
        assert (
            relative(mixed[row], one(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]) <= 2e-5
        )


@torch.no_grad()
def test_an_adapter_that_begins_in_the_middle_beside_one_on_the_tower():
    base, tenants, _ = family("llava")
    language = r".*language_model.*(q_proj|down_proj)"
    options = {"alora_invocation_tokens": [8, 10], "task_type": "CAUSAL_LM"}
    late = adapt(base, 5, target_modules=language, **options)
    model = MultiLoraModel(base)
    model.load_adapter("0", tenants["0"])
    model.load_adapter("late", late)
    inputs, alone = inputs_of("llava", [2, 1, 1])
    names = ["0", "late", None]  # row 1 ends with 8, 10
    mixed = model(**inputs, adapter_ids=names).logits
    for row, one in enumerate((tenants["0"], late, base)):
        keep = alone[row]["attention_mask"][0].bool()
        assert relative(mixed[row][keep], one(**alone[row]).logits[0][keep]) <= 2e-5
    generated = model.generate(**inputs, adapter_ids=names, **GREEDY)
    assert torch.equal(generated[1], late.generate(**alone[1], **GREEDY)[0])
    assert torch.equal(generated[0], tenants["0"].generate(**alone[0], **GREEDY)[0])

    model.load_adapter("seeing", adapt(base, 6, target_modules=["fc1"], **options))
    with pytest.raises(UnsupportedMethodError, match=r"'seeing' acts from its invocation tokens on.*fc1"):
        model(**inputs, adapter_ids=[None, "seeing", None])


def test_what_does_not_add_up_is_refused(monkeypatch):
    _, _, model = family("llava")
    inputs, _ = inputs_of("llava", [1, 2])
    ids = ["0", None]
    for changed in (
        {"pixel_values": inputs["pixel_values"][:2]},
        {"input_ids": torch.where(inputs["input_ids"] == IMAGE, 7, inputs["input_ids"])},
        {"pixel_values": inputs["pixel_values"][:, None]},
        {"pixel_values": inputs["pixel_values"][:0]},
    ):
        with pytest.raises(AdapterIdsError, match="which row each image belongs to"):
            model(**{**inputs, **changed}, adapter_ids=ids)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.config.vision_config, "model_type", "pixtral")
        with pytest.raises(AdapterIdsError, match="a pixtral takes images of any size"):
            model(**inputs, adapter_ids=ids)
    embeds = model.model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(AdapterIdsError, match="placeholders in input_ids"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], adapter_ids=ids)

    _, _, model = family("qwen2_vl")
    inputs, _ = inputs_of("qwen2_vl", [1, 2])
    for changed in (
        {"image_grid_thw": None},
        {"image_grid_thw": inputs["image_grid_thw"].flip(0)},
        {"image_grid_thw": inputs["image_grid_thw"][:2]},
        {"pixel_values_videos": inputs["pixel_values"]},
    ):
        with pytest.raises(AdapterIdsError, match="which row each image belongs to"):
            model(**{**inputs, **changed}, adapter_ids=ids)
