"""The command: every mistake of a user is one sentence on standard error that says what to do, and exit code 2."""

import dataclasses
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from architectures import ARCHITECTURES, VOCAB, adapt
from peft import HiraConfig, PolyConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import lorakit
from lorakit import cli
from lorakit.adapters.bank import AdapterBank

LLAMA = ARCHITECTURES["llama"]


def save_tokenizer(folder: Path, **tokens: str) -> None:
    """Words "w3" … with their numbers as ids."""
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    model = Tokenizer(WordLevel(words, unk_token="w3"))
    model.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=model, **tokens).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base with its tokenizer, two adapters and a bank of them; not to be changed."""
    root = tmp_path_factory.mktemp("made")
    base = LLAMA.build()
    base.save_pretrained(root / "base")
    save_tokenizer(root / "base", pad_token="<pad>", eos_token="<eos>")
    for seed, name in enumerate(["sql", "law"]):
        tenant = adapt(base, seed, target_modules=["q_proj", "down_proj"], use_dora=name == "law")
        tenant.peft_config["default"].base_model_name_or_path = str(root / "base")
        tenant.save_pretrained(root / name)
    lorakit.export([root / "sql", root / "law"], root / "bank")
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of it all, and the folder that the command runs in."""
    for name in ("base", "sql", "law", "bank"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def lorakit_(monkeypatch, capsys):
    """Runs the console script in this process."""

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "dumb")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(lorakit_):
    """Runs it, expects a refusal, gives the sentence."""

    def run(*args: object) -> str:
        outcome = lorakit_(*args)
        assert outcome.code == 2, (outcome.code, outcome.out, outcome.err)
        assert outcome.err.startswith("error: ") and outcome.err.count("error: ") == 1
        assert outcome.err.count("\n") == 1, f"one line, not {outcome.err!r}"
        assert "Traceback" not in outcome.err and outcome.out == ""
        return outcome.err

    return run


def real(*args: object, stdin: str = "", **options) -> Outcome:
    """Runs `python -m lorakit` as its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", *map(str, args)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        **{"env": {**os.environ, "COLUMNS": "200"}, **options},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


# What works


def test_inspect_tells_how_the_base_was_quantised(lorakit_, place):
    bank = AdapterBank.open("bank")
    form = dataclasses.replace(bank.form("law"), base_quantisation="gptq 4-bit group 128")
    bank.add_forms([("tight", form, "here")])
    assert "dora on gptq 4-bit group 128" in lorakit_("inspect", "bank").out
    outcome = lorakit_("inspect", "bank", "tight")
    assert "computed from a base quantised by gptq 4-bit group 128" in " ".join(outcome.out.split())
    assert "computed" not in lorakit_("inspect", "bank", "sql").out


def test_export_inspect_verify_and_back(lorakit_, place):
    outcome = lorakit_("export", "new", "sql", "legal=law")
    assert outcome.code == 0 and "2 adapters of" in outcome.out and outcome.err == ""
    assert AdapterBank.open("new").names == ["sql", "legal"]
    outcome = lorakit_("inspect", "new")
    assert all(word in outcome.out for word in ("2 adapters of", "sql", "legal", "dora", "float32"))
    outcome = lorakit_("inspect", "new", "legal")
    assert "legal: dora, float32" in outcome.out and "model.layers.1.mlp.down_proj" in outcome.out
    assert "computed from a base in full precision" in " ".join(outcome.out.split())
    assert "2 adapters are sound." in lorakit_("verify", "new").out
    assert "1 adapters are sound." in lorakit_("verify", "new", "sql").out
    outcome = lorakit_("export-peft", "new", "legal", "out")
    assert outcome.code == 0 and "wrote out" in outcome.out
    assert (place / "out" / "adapter_model.safetensors").read_bytes() == (
        place / "law" / "adapter_model.safetensors"
    ).read_bytes()
    assert lorakit_("remove", "new", "sql").code == 0
    assert AdapterBank.open("new").names == ["legal"]
    assert lorakit_("verify", "new").code == 0


def test_options_of_export(lorakit_, place):
    assert lorakit_("export", "new", "sql", "--base", "base", "--dtype", "bfloat16").code == 0
    assert AdapterBank.open("new")["sql"].dtype == torch.bfloat16 and AdapterBank.open("new").base_id == str(
        place / "base"
    )
    assert lorakit_("export", "new", "law", "--add").code == 0
    assert AdapterBank.open("new").names == ["sql", "law"]
    assert lorakit_("export", "new", "sql=law", "--add", "--overwrite").code == 0
    assert AdapterBank.open("new")["sql"].method == "dora"
    assert lorakit_("export", "new", "law", "--overwrite").code == 0
    assert AdapterBank.open("new").names == ["law"]


def test_merge(lorakit_, place):
    shutil.copytree("sql", place / "tax")
    assert lorakit_("export", "bank", "tax", "--add").code == 0
    outcome = lorakit_("merge", "bank", "mix", "sql=0.7", "tax=-0.3")
    assert outcome.code == 0 and "4 adapters of" in outcome.out and "0.7*sql + -0.3*tax (cat)" in outcome.out
    outcome = lorakit_(
        *("merge", "bank", "mix", "sql=1", "tax=1", "-c", "ties_svd", "--density", 0.5, "--rank", 3, "--overwrite"),
        *("--majority-sign-method", "frequency", "--seed", 3, "--dtype", "bfloat16"),
    )
    assert outcome.code == 0 and "(ties_svd, density 0.5)" in outcome.out
    entry = AdapterBank.open("bank")["mix"]
    assert (entry.rank, entry.dtype) == (3, torch.bfloat16)
    assert "4 adapters are sound." in lorakit_("verify", "bank").out
    assert lorakit_("export-peft", "bank", "mix", "out").code == 0
    assert lorakit_("export", "bank", "again=out", "--add").code == 0
    assert AdapterBank.open("bank")["again"].blake3 == entry.blake3


def test_what_has_no_exact_form_and_what_has_several_tasks(lorakit_, refused, place):
    targets = {"target_modules": ["q_proj", "down_proj"]}
    for name, config in {
        "hira": HiraConfig(r=4, init_weights=False, **targets),
        "poly": PolyConfig(r=4, n_tasks=3, **targets),
    }.items():
        tenant = get_peft_model(LLAMA.build(), config)
        tenant.peft_config["default"].base_model_name_or_path = "base"
        tenant.save_pretrained(place / name)
    assert "export with svd_energy=0.999" in refused("export", "new", "hira")
    assert "POLY has 3 tasks" in refused("export", "new", "poly")
    choices = ("--base", "base", "--svd-energy", 0.9, "--task-id", "p=2")
    outcome = lorakit_("export", "new", "hira", "law", "p=poly", *choices)
    assert outcome.code == 0 and "poly (task 2)" in outcome.out and "error" in outcome.out
    entry = AdapterBank.open("new")["hira"]
    cells = {row[0]: row[-1] for row in answers(lorakit_("inspect", "new").out)}
    assert cells["hira"] == f"{entry.svd_error:.1e}" and cells["law"] == cells["p"] == "exact"
    rows = answers(lorakit_("inspect", "new", "hira").out)
    assert [row[-1] for row in rows] == [f"{error:.1e}" for error in entry.svd_errors.values()]
    assert "error" not in lorakit_("inspect", "new", "law").out
    assert "error" not in lorakit_("inspect", "bank").out
    assert lorakit_("export", "bank", "hira", "p=poly", "--add", "--svd-energy", 1, "--task-id", "p=0").code == 0
    assert AdapterBank.open("bank")["p"].task_id == 0


def test_sources_may_hold_equals_signs(lorakit_, place):
    (place / "r=4").mkdir()
    shutil.copytree("sql", place / "r=4" / "a")
    shutil.copytree("sql", place / "./run-x=1 y")
    assert lorakit_("export", "one", "x=r=4/a").code == 0
    assert AdapterBank.open("one").names == ["x"]
    assert lorakit_("export", "two", "./r=4/a").code == 0
    assert AdapterBank.open("two").names == ["a"]


def answers(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in out.splitlines() if "│" in line]


def test_generate_answers_every_prompt_by_every_adapter(lorakit_, place):
    outcome = lorakit_("generate", "bank", "w5 w6 w7", "w9", "--with-base", "-a", "law", "--max-new-tokens", 4)
    assert outcome.code == 0
    rows = answers(outcome.out)
    assert [row[:2] for row in rows] == [
        ["w5 w6 w7", "law"],
        ["w5 w6 w7", "(base)"],
        ["w9", "law"],
        ["w9", "(base)"],
    ]
    tokenizer = AutoTokenizer.from_pretrained("base")
    model = lorakit.MultiLoraModel.from_pretrained("base", "bank")
    for prompt, name, answer in rows:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**ids, adapter_ids=name if name == "law" else None, max_new_tokens=4, do_sample=False)
        assert answer == tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(answers(lorakit_("generate", "bank", "w5", "--max-new-tokens", 1).out)) == 2
    outcome = lorakit_("generate", "bank", "w5", "--with-base", "--max-new-tokens", 1)
    assert [row[1] for row in answers(outcome.out)] == ["sql", "law", "(base)"]


def test_sampling_repeats_with_its_seed(lorakit_, place):
    def sample(seed):
        options = ("-a", "sql", "--temperature", 2, "--seed", seed, "--max-new-tokens", 8)
        return answers(lorakit_("generate", "bank", "w5", *options).out)[0][2]

    assert sample(1) == sample(1) != sample(2)


def test_generate_shows_a_whole_answer_of_an_encoder_decoder(lorakit_, place):
    t5 = ARCHITECTURES["t5"].build()
    t5.save_pretrained("t5")
    save_tokenizer(place / "t5", pad_token="<pad>", eos_token="<eos>")
    lorakit.export({"x": adapt(t5, 0, target_modules=["q"])}, "t5-bank", base_model="t5")
    outcome = lorakit_("generate", "t5-bank", "w5 w6 w7 w8 w9", "--max-new-tokens", 5)
    assert outcome.code == 0
    model = lorakit.MultiLoraModel.from_pretrained("t5", "t5-bank")
    tokenizer = AutoTokenizer.from_pretrained("t5")
    ids = tokenizer(["w5 w6 w7 w8 w9"], return_tensors="pt")
    ids = {key: ids[key] for key in ("input_ids", "attention_mask")}
    output = model.generate(**ids, adapter_ids="x", max_new_tokens=5, do_sample=False)
    expected = tokenizer.decode(output[0], skip_special_tokens=True)
    assert expected and answers(outcome.out)[0][2] == expected


def test_text_is_shown_as_it_is(lorakit_, place):
    """Square brackets and colons in names, sources and answers are no markup."""
    shutil.copytree("sql", place / "[bold]x[/nothing] :smile:")
    outcome = lorakit_("export", "[red]", "x=[bold]x[/nothing] :smile:")
    assert outcome.code == 0 and "[bold]x[/nothing] :smile:" in outcome.out and "[red]: 1 adapters" in outcome.out
    assert "from [bold]x[/nothing] :smile:" in lorakit_("inspect", "[red]", "x").out
    outcome = lorakit_("generate", "[red]", "w5 [/b] [bold]", "--max-new-tokens", 1)
    assert outcome.code == 0 and "w5 [/b] [bold]" in outcome.out
    assert "wrote [out]" in lorakit_("export-peft", "[red]", "x", "[out]").out


# What does not


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("export new gone --base base", r"'gone' is neither a folder here nor a repository .* Check its spelling"),
        ("export new sql --base gone", r"the base model 'gone' is neither a folder .* Name a folder or a Hub id"),
        ("export bank sql", r"holds a bank already: add to it .*--add.* replace it .*--overwrite"),
        ("export base sql", r"'base' is not empty \(it holds 'config.json'\): choose an empty or a new folder"),
        ("export new sql --dtype int8", r"--dtype 'int8' is unknown; use one of float32, bfloat16, float16"),
        ("export new sql --svd-energy 1.5", r"svd_energy is 1.5; give a number above 0, and of at most 1"),
        ("export new sql --task-id sql", r"--task-id 'sql' is no NAME=TASK, such as sql=2"),
        ("export new sql --task-id sql=x", r"--task-id 'sql=x' is no NAME=TASK, such as sql=2"),
        ("export new sql --task-id x=2", r"task_ids names 'x', which is none of the adapters: sql"),
        ("export new sql --task-id sql=2", r"task_id=2 was chosen, but a LORA has no tasks; leave it out"),
        ("export new sql --task-id sql=1 --task-id sql=2", r"adapter 'sql' has two tasks; give it one"),
        ("export new sql sql", r"two sources would be called 'sql'; name them apart, as NAME=SOURCE"),
        ("export new x=", r"'x=' names no source; write NAME=SOURCE"),
        ("export new =sql", r"'' cannot be an adapter's name. Choose 1 to 128"),
        ("export new ../x=sql", r"'../x' cannot be an adapter's name. Choose 1 to 128"),
        ("export new base", r"base holds no adapter_config.json; name a folder"),
        ("export new .", r"holds no adapter_config.json; its subfolders \['law', 'sql'\] do: name one"),
        ("export new sql/adapter_config.json", r"is a file; name the folder that holds it"),
        ("export bank sql --add", r"'sql'.*overwrite"),
        ("export gone sql --add", r"'gone' is no folder. Check the path, or make a bank"),
        ("inspect gone", r"'gone' is no folder. Check the path, or make a bank"),
        ("inspect base", r"'base' is no bank: it has no bank.json"),
        ("inspect base/config.json", r"'base/config.json' is no folder. Check the path"),
        ("inspect bank sqll", r"no adapter 'sqll' in bank 'bank'. Did you mean 'sql'\?"),
        ("verify gone", r"'gone' is no folder. Check the path"),
        ("verify bank sql x", r"no adapter 'x' in bank 'bank'. It holds sql, law"),
        ("remove bank x", r"no adapter 'x' in bank"),
        ("remove bank sql x", r"no adapter 'x' in bank"),
        ("export-peft bank x out", r"no adapter 'x' in bank"),
        ("export-peft bank sql base", r"'base' is there already and not empty: choose another folder"),
        ("merge gone mix sql=1", r"'gone' is no folder. Check the path"),
        ("merge bank mix sql=1 x=1", r"no adapter 'x' in bank"),
        ("merge bank law sql=1", r"'law' is in the bank already: choose another name"),
        ("merge bank mix sql", r"'sql' is no NAME=WEIGHT, such as sql=0.7"),
        ("merge bank mix sql=much", r"'sql=much' is no NAME=WEIGHT, such as sql=0.7"),
        ("merge bank mix sql=1 sql=2", r"adapter 'sql' has two weights; give it one"),
        ("merge bank mix sql=nan law=1", r"the weight of adapter 'sql' is nan; give a finite number"),
        ("merge bank mix sql=1 law=1 -c mean", r"combination 'mean' is unknown; use one of linear, cat, svd"),
        ("merge bank mix sql=1 law=1 -c ties", r"combination 'ties' needs a density"),
        ("merge bank mix sql=1 law=1 --dtype int8", r"--dtype 'int8' is unknown"),
        ("merge bank mix sql=1 law=1", r"'law' scales the channels of model.layers.0.mlp.down_proj, .*leave it out"),
        ("generate bank hi -a x", r"no adapter 'x' in bank"),
        ("generate gone hi", r"'gone' is no folder. Check the path"),
        ("generate bank hi --base gone", r"base model 'gone' .*"),
        ("generate bank hi --temperature inf", r"--temperature is inf; give a finite number"),
        ("train gone.yaml", r"gone.yaml cannot be read as YAML"),
        ("train base", r"base cannot be read as YAML"),
        ("train base/config.json --set x", r"--set 'x' is no KEY=VALUE"),
        ("train base/config.json --set x=[", r"--set 'x=\[': the value is no YAML; quote it"),
        ("train base/config.json", r"base/config.json: Unknown key"),
        ("bench gone", r"there is no benchmark 'gone'; there are "),
        ("serve base --bank bank --dtype int8", "'int8' is unknown"),
        ("serve base --bank bank --log-format xml", "'xml' is unknown"),
        ("serve base --bank bank --admin-key short", "shorter than 16"),
        ("serve base --bank bank --adapter-hub", "set LORAKIT_ADMIN_KEY"),
        ("serve base --bank bank --set linger=3", "give --replicas"),
        ("serve base --bank bank --replicas 0", "from 1 on, or two such as 1:8"),
        ("serve base --bank bank --replicas 4:2", "from 1 on, or two such as 1:8"),
        ("serve base --bank bank --replicas 1:2 --set lingers=3", "no field 'lingers'"),
        ("serve base --bank bank --tenants none.db", "no file of tenants at none.db"),
        ("demo base", "belong together"),
        ("demo --bank bank", "belong together"),
        ("demo nowhere --bank bank", "nowhere"),
    ],
)
def test_mistakes(refused, place, args, message):
    before = sorted(str(path) for path in place.rglob("*"))
    sentence = refused(*args.split(" "))
    assert re.search(message, sentence), sentence
    assert sorted(str(path) for path in place.rglob("*")) == before
    assert AdapterBank.open("bank").names == ["sql", "law"]


def test_train_values(refused, place):
    Path("run.yaml").write_text(yaml.safe_dump({"output_dir": "out", "train_file": "data.jsonl"}))
    for value, message in [
        ("rank=-1", "rank"),
        ("rank=four", "rank is 'four': give a whole number"),
        ("rnk=4", "Unknown key 'rnk'. Did you mean 'rank'"),
        ("epochs=.nan", "epochs is nan"),
        ("output_dir=", "output_dir"),
    ]:
        assert message in refused("train", "run.yaml", "--set", value)
    Path("list.yaml").write_text("- 1")
    assert "holds no mapping" in refused("train", "list.yaml")
    Path("empty.yaml").write_text("")
    assert "holds no mapping" in refused("train", "empty.yaml")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml" in refused("train", "bytes.yaml")


def test_generate_without_what_it_needs(refused, place):
    assert "a prompt is empty" in refused("generate", "bank", "hi", "")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / "base" / file).unlink()
    assert "no tokenizer that can be read" in refused("generate", "bank", "hi", "--base", "base")
    (place / "base" / "tokenizer.json").write_text("{")
    assert "no tokenizer that can be read" in refused("generate", "bank", "hi", "--base", "base")
    save_tokenizer(place / "base")
    assert "neither a padding nor an end token" in refused("generate", "bank", "hi", "--base", "base")
    lorakit.export([place / "sql"], place / "homeless", base_model=LLAMA.build())
    assert "does not say where its base model is; give it with --base" in refused("generate", "homeless", "hi")
    bert = ARCHITECTURES["bert"].build()
    bert.save_pretrained(place / "bert")
    save_tokenizer(place / "bert", pad_token="<pad>")
    lorakit.export({"x": adapt(bert, 0, target_modules=["query"])}, "berts", base_model=place / "bert")
    assert "is for a BertForSequenceClassification, which generates no text" in refused("generate", "berts", "hi")


def test_another_base_is_refused(refused, place):
    other = LLAMA.build()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained("other")
    save_tokenizer(place / "other", pad_token="<pad>")
    assert "made for another base model" in refused("generate", "bank", "hi", "--base", "other")
    assert "made for another base model" in refused("export", "bank", "x=sql", "--add", "--base", "other")


@pytest.mark.parametrize("damage", ["{", "[]", "", '{"format_version": 99}', "null", "[" * 100_000])
def test_a_damaged_index(refused, place, damage):
    (place / "bank" / "bank.json").write_text(damage)
    for command in (["inspect", "bank"], ["verify", "bank"], ["remove", "bank", "sql"], ["generate", "bank", "hi"]):
        assert "bank" in refused(*command)


def test_a_damaged_shard(refused, lorakit_, place):
    shard = place / "bank" / "bank-0001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 255
    shard.write_bytes(data)
    sentence = refused("verify", "bank")
    assert "is damaged" in sentence and "Restore the shards" in sentence
    assert lorakit_("inspect", "bank").code == 0
    shard.unlink()
    assert "Restore" in refused("export-peft", "bank", "sql", "out") and not (place / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        "",
        "nope",
        "export",
        "export new",
        "inspect",
        "inspect a b c",
        "merge bank mix",
        "merge bank mix sql=1 --rank two",
        "generate bank",
        "generate bank hi --max-new-tokens 0",
        "generate bank hi --max-new-tokens many",
        "generate bank hi --temperature -1",
        "generate bank hi --temperature nan",
        "export new sql --nope",
        "quickstart --held-out 0",
        "train",
    ],
)
def test_wrong_usage_also_exits_2(lorakit_, place, args):
    outcome = lorakit_(*args.split())
    assert outcome.code == 2
    assert "Usage: " in outcome.err + outcome.out and "Traceback" not in outcome.err


def test_a_missing_package_names_what_to_install(refused, place, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "trl" else find(name, *a))
    assert "trl: pip install 'lorakit[train]'" in refused("train", "x.yaml")
    assert "trl: pip install 'lorakit[quickstart]'" in refused("quickstart")


# The system says no


def test_a_full_disk(refused, place, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(place.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert "No space left on device. Free space" in refused("export", "new", "sql")
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        assert "No space left on device. Free space" in refused("export", "bank", "x=sql", "--add")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert "No space left on device. Free space" in refused("export-peft", "bank", "sql", "out")
    assert sorted(path for path in place.rglob("*") if path.name != ".lock") == [
        path for path in before if path.name != ".lock"
    ]


def test_any_other_refusal_of_the_system(refused, place, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/where")

    monkeypatch.setattr(AdapterBank, "open", denied)
    assert refused("inspect", "bank").startswith("error: /some/where: Permission denied. Check the path")


def test_an_interrupt_is_quiet(lorakit_, place, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterBank, "open", interrupt)
    outcome = lorakit_("inspect", "bank")
    assert outcome.code in (1, 130) and outcome.out.strip() == "" and "Traceback" not in outcome.err


# As its own process


def test_the_typer_app_raises_typed_errors(place):
    result = CliRunner().invoke(cli.app, ["inspect", "gone"])
    assert isinstance(result.exception, lorakit.LorakitError)


@pytest.mark.parametrize("command", [[], ["export"], ["inspect"], ["verify"], ["remove"], ["merge"], ["export-peft"],
                                     ["push"], ["pull"], ["generate"], ["serve"], ["demo"], ["tenants"],
                                     ["tenants", "add"], ["simulate"], ["train"], ["quickstart"],
                                     ["bench"]])  # fmt: skip
def test_help_of_every_command(lorakit_, command):
    outcome = lorakit_(*command, "--help")
    assert outcome.code == 0 and "Usage: " in outcome.out and outcome.err == ""


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['lorakit', *sys.argv[1:]]\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    for args in (["--help"], ["export", "--help"], ["generate", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def test_a_real_run(place):
    done = real("export", "new", "sql", cwd=place)
    assert done.code == 0 and "1 adapters" in done.out and done.err == ""
    done = real("inspect", "new", "x", cwd=place)
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: no adapter 'x' in bank 'new'. It holds sql. Names are case-sensitive.\n"


@pytest.mark.long
def test_a_reader_that_stops_early_and_an_output_that_is_full(place):
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "inspect", "bank", "sql"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=place,
        text=True,
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(300) in (0, 1) and "Traceback" not in err and "Exception ignored" not in err
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", "inspect", "bank"],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=place,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device. Check the path, its permissions and the free space.\n"


@pytest.mark.long
def test_names_that_are_no_text(place):
    name = os.fsdecode(b"bank-\xff")
    shutil.copytree("bank", place / name)
    done = real("inspect", name, cwd=place)
    assert done.code == 0 and "\\udcff: 2 adapters" in done.out
    done = real("inspect", os.fsdecode(b"gone-\xff"), cwd=place)
    assert done.code == 2 and "is no folder" in done.err and "Traceback" not in done.err
    ascii_ = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    assert real("inspect", "bank", cwd=place, env=ascii_).code == 0
    assert real("inspect", "gone-ä", cwd=place, env=ascii_).code == 2


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(place):
    """Online, but nobody answers, also not when asked again."""
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    done = real("export", "new", "sql", "law=org/adapter", "--base", "org/base", cwd=place, env=env)
    assert done.code == 2 and "the base model 'org/base' is neither a folder here nor" in done.err
    assert "Traceback" not in done.err and not (place / "new").exists()
