"""The recipe on a tiny model: what it writes, resuming, reuse, and the methods it can be asked for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from lorakit.errors import BaseModelNotFoundError, ConfigError, MissingDependencyError
from lorakit.recipes import FinetuneConfig
from lorakit.recipes import finetune as recipe
from lorakit.recipes.finetune import finetune


def make(folder: Path, base: Path, **settings: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "output_dir": folder, "base_model": str(base), "task": "number_words", "train_size": 8, "rank": 4,
        "learning_rate": 1e-2, "max_steps": 6, "device": "cpu", "save_steps": 2,
    }  # fmt: skip
    return FinetuneConfig(**(values | settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A run of six steps, shared by the tests that only look at it."""
    config = make(tmp_path_factory.mktemp("runs") / "run", tiny_base)
    finetune(config, progress=False)
    return config


def test_writes_a_checkpoint_that_peft_loads(finished: FinetuneConfig, tiny_base: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, str(finished.output_dir)).eval()(ids).logits
    assert not torch.allclose(before, after)
    assert all(tensor.dtype == torch.float32 for tensor in weights(finished.output_dir).values())
    saved = json.loads((finished.output_dir / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tiny_base)


def test_leaves_recipe_and_loss_plot_and_no_checkpoints(finished: FinetuneConfig) -> None:
    folder = finished.output_dir
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    recorded = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert FinetuneConfig.from_dict(recorded["config"]) == finished
    assert recorded["results"]["steps"] == 6
    assert not (folder / "checkpoints").exists()


def test_loss_goes_down(tiny_base: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "run", tiny_base, max_steps=40, layers="all", rank=8, save_steps=100)
    finetune(config, progress=False)
    short = make(tmp_path / "short", tiny_base, max_steps=1, layers="all", rank=8)
    finetune(short, progress=False)
    final, first = (
        yaml.safe_load((c.output_dir / "recipe.yaml").read_text())["results"]["final_loss"] for c in (config, short)
    )
    assert final < first - 0.2


def test_finished_run_is_reused(finished: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "training_rows", lambda config: pytest.fail("trained again"))
    assert finetune(finished, progress=False) == finished.output_dir


def test_damaged_run_is_not_reused(tiny_base: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "run", tiny_base, max_steps=1)
    finetune(config, progress=False)
    good = weights(config.output_dir)
    file = config.output_dir / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    finetune(config, progress=False)
    assert weights(config.output_dir).keys() == good.keys()


def test_other_settings_do_not_replace_a_run(finished: FinetuneConfig) -> None:
    before = weights(finished.output_dir)
    with pytest.raises(ConfigError, match="other settings.*overwrite"):
        finetune(dataclasses.replace(finished, seed=1), progress=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(finished.output_dir).items())
    assert finetune(finished, progress=False) == finished.output_dir


def test_overwrite_replaces_a_run(tiny_base: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "run", tiny_base, max_steps=1)
    finetune(config, progress=False)
    before = weights(config.output_dir)
    finetune(dataclasses.replace(config, seed=1, overwrite=True), progress=False)
    assert any(not torch.equal(before[key], tensor) for key, tensor in weights(config.output_dir).items())


def test_someone_elses_checkpoint_is_not_replaced(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match="overwrite"):
        finetune(make(tmp_path, tiny_base), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


class _Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_resumed_run_ends_with_the_same_weights(
    finished: FinetuneConfig, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(finished, output_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_progress_bar", _Interrupt)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, progress=True)
    assert (config.output_dir / "checkpoints" / "checkpoint-2").is_dir()
    assert not (config.output_dir / "recipe.yaml").exists()
    finetune(config, progress=False)
    whole, resumed = weights(finished.output_dir), weights(config.output_dir)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_loss_on_a_cpu_is_the_trainers_own(
    finished: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    assert recipe.trainer_class(AutoModelForCausalLM.from_pretrained(finished.base_model), "cpu") is not SFTTrainer
    monkeypatch.setattr(recipe, "trainer_class", lambda model, device: SFTTrainer)
    config = dataclasses.replace(finished, output_dir=tmp_path / "run")
    finetune(config, progress=False)
    ours, theirs = weights(finished.output_dir), weights(config.output_dir)
    # Adam divides by the gradient's size, so a rounding difference in a tiny gradient shows in the weight.
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-4) for key in ours)


@pytest.mark.parametrize("flag", ["use_dora", "use_rslora"])
def test_method_reaches_the_adapter_config(flag: str, tiny_base: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "run", tiny_base, max_steps=1, layers=1, **{flag: True})
    saved = json.loads((finetune(config, progress=False) / "adapter_config.json").read_text())
    assert saved[flag] is True
    assert saved["layers_to_transform"] == [2]
    assert all(".layers.2." in key for key in weights(config.output_dir))


def test_jsonl_of_messages(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps({"messages": turn}) + "\n\n" + json.dumps({"prompt": "c", "completion": "d"}) + "\n")
    config = make(tmp_path / "run", tiny_base, task=None, train_file=file, max_steps=1)
    assert (finetune(config, progress=False) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"task": "no_such"}, ConfigError, "unknown"),
        ({"base_model": "/no/such/folder"}, BaseModelNotFoundError, "base_model"),
        ({"target_modules": ["no_proj"]}, ConfigError, "no_proj"),
        ({"layers": 4}, ConfigError, "base has 3"),
        ({"max_length": 5}, ConfigError, "max_length"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    settings: dict[str, Any], error: type[Exception], message: str, tiny_base: Path, tmp_path: Path
) -> None:
    config = make(tmp_path / "run", tiny_base, **settings)
    with pytest.raises(error, match=message):
        finetune(config, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_asked_for_and_absent(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU"):
        recipe.resolve_device(make(tmp_path / "run", tiny_base, device="cuda"))


@pytest.mark.gpu
def test_qlora_trains_a_plain_adapter_over_a_4_bit_base(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = finetune(make(tmp_path / "run", tiny_base, use_qlora=True, device="auto"), progress=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_qlora_without_bitsandbytes(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(MissingDependencyError, match="bitsandbytes"):
        finetune(make(tmp_path / "run", tiny_base, use_qlora=True, device="auto"), progress=False)
