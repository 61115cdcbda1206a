"""Reading a config: every mistake is a ConfigError that names the key."""

from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.recipes import FinetuneConfig

GOOD: dict[str, Any] = {"output_dir": "run", "task": "text_to_sql"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rnk": 8}, "rnk.*rank"),
        ({"qqqq": 8}, "qqqq.*Known keys"),
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"dropout": 1.0}, "dropout"),
        ({"warmup_ratio": -0.1}, "warmup_ratio"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"layers": "most"}, "layers"),
        ({"layers": 0}, "layers"),
        ({"dtype": "float16"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "q_proj"}, "target_modules"),
        ({"max_steps": 0}, "max_steps"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"train_file": "x.jsonl"}, "exactly one"),
        ({"task": None}, "exactly one"),
        ({"use_qlora": True, "device": "cpu"}, "use_qlora"),
    ],
)
def test_mistakes_name_the_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FinetuneConfig.from_dict(GOOD | change)


def test_output_dir_is_required() -> None:
    with pytest.raises(ConfigError, match="output_dir"):
        FinetuneConfig.from_dict({"task": "text_to_sql"})


def test_yaml_numbers_and_paths(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("output_dir: runs/own\ntrain_file: rows.jsonl\nlearning_rate: 1e-3\nlayers: 4\n")
    config = FinetuneConfig.from_yaml(file)
    # YAML 1.1 takes 1e-3 for a string; a person means the number.
    assert config.learning_rate == 1e-3
    assert config.train_file == tmp_path / "rows.jsonl"
    assert config.layers == 4
    assert FinetuneConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("text", ["- a\n", "a: [", ""])
def test_no_mapping(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        FinetuneConfig.from_yaml(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml"):
        FinetuneConfig.from_yaml(tmp_path / "none.yaml")


def test_digest_follows_settings_and_data(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    config = FinetuneConfig(output_dir=tmp_path, train_file=file)
    digest = config.digest()
    assert FinetuneConfig(output_dir=tmp_path / "x", train_file=file, resume=False).digest() == digest
    assert FinetuneConfig(output_dir=tmp_path, train_file=file, rank=8).digest() != digest
    file.write_text('{"prompt": "a", "completion": "c"}\n')
    assert config.digest() != digest


def test_shipped_configs_load() -> None:
    import lorakit.recipes

    configs = sorted(Path(lorakit.recipes.__file__).parent.glob("*.yaml"))
    assert len(configs) >= 4
    for path in configs:
        FinetuneConfig.from_yaml(path).digest()
