"""The README.md of a bank's repository: what is known of the bank, and how to use it.

What lorakit writes stands between two marks, and its metadata in a few keys; all else is a person's, and is kept.
Knows an index and texts; asks nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lorakit.adapters.entry import AdapterEntry
from lorakit.adapters.index import Index
from lorakit.adapters.sizes import human_bytes
from lorakit.errors import BankError

BEGIN = "<!-- lorakit: begin. What stands from here to the end mark is written anew by every push. -->"
END = "<!-- lorakit: end -->"

_OURS = re.compile(r"<!-- lorakit: begin\..*?<!-- lorakit: end -->", re.DOTALL)
_ROWS = 1000  # in the table; a page of more is of no use
_SHOWN = 2  # adapters in the example


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        repo_id: the repository.
        index: the bank's, as it is pushed.
        base: the base's Hub id; None where it has none that is known.
        has_peft: whether the repository holds PEFT folders too.
        revision: where the bank is pushed; None: main.
        scores: name → what a person knows of an adapter's quality.
    """

    repo_id: str
    index: Index
    base: str | None = None
    has_peft: bool = False
    revision: str | None = None
    scores: Mapping[str, float | str] = field(default_factory=dict)


def write_card(facts: Facts, existing: str | None = None) -> str:
    """The card of a bank.

    Args:
        facts: what it says.
        existing: the repository's README.md; its text outside of the marks and its other metadata are kept. A text
            without marks gets them at its end.

    Raises:
        BankError: the existing metadata cannot be read.
    """
    try:
        card = ModelCard(existing or "---\n{}\n---\n")
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise BankError(
            f"the README.md of {facts.repo_id!r} has metadata that cannot be read ({' '.join(str(error).split())}): "
            "mend it there, then push again."
        ) from error
    data = card.data
    assert isinstance(data, ModelCardData)
    if facts.base is not None:
        data.base_model = facts.base
        data["base_model_relation"] = "adapter"
    data.library_name = data.library_name or "lorakit"
    architecture = str(facts.index.fingerprint.get("architecture") or "")
    if architecture.endswith("ForCausalLM"):
        data.pipeline_tag = data.pipeline_tag or "text-generation"
    methods = sorted({entry.method for entry in facts.index.adapters.values()})
    tags = data.tags if isinstance(data.tags, list) else []
    data.tags = list(dict.fromkeys([*tags, "lorakit", "peft", *methods]))
    ours = f"{BEGIN}\n\n{_text(facts, architecture)}\n\n{END}"
    if _OURS.search(card.text):
        card.text = _OURS.sub(lambda _: ours, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{ours}\n" if card.text.strip() else f"\n{ours}\n"
    return str(card)


def _text(facts: Facts, architecture: str) -> str:
    adapters = list(facts.index.adapters.values())
    name = facts.repo_id.split("/")[-1]
    base = f"`{facts.base}`" if facts.base else f"one base model{f', a `{architecture}`' if architecture else ''}"
    count = "1 PEFT adapter" if len(adapters) == 1 else f"{len(adapters)} PEFT adapters"
    parts = [
        f"# {name}",
        f"{count} of {base}, packed into one bank of lorakit, which serves any mix of them in one batch.",
        _table(adapters, facts.scores),
    ]
    if adapters:
        parts += ["## Use", _example(facts, architecture)]
        if facts.has_peft and architecture:
            parts += [f"With PEFT alone, one of them:\n\n{_peft_example(facts, architecture)}"]
    return "\n\n".join(part for part in parts if part)


def _table(adapters: list[AdapterEntry], scores: Mapping[str, float | str]) -> str:
    if not adapters:
        return ""
    columns = ["adapter", "method", "rank", "size", *(["score"] if scores else [])]
    lines = [_row(columns), _row(["---", "---", "---:", "---:", *(["---:"] if scores else [])])]
    for entry in adapters[:_ROWS]:
        score = scores.get(entry.name, "")
        shown = score if isinstance(score, str) else f"{score:g}"
        ranks = "/".join(map(str, entry.ranks))
        cells = [f"`{entry.name}`", entry.method, ranks, human_bytes(entry.nbytes), *([shown] if scores else [])]
        lines.append(_row(cells))
    more = f"\n\nAnd {len(adapters) - _ROWS} more, in `bank.json`." if len(adapters) > _ROWS else ""
    return "\n".join(lines) + more


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def _example(facts: Facts, architecture: str) -> str:
    """A program that runs as it is, as far as the bank tells how."""
    names = list(facts.index.adapters)[:_SHOWN]
    listed = "[" + ", ".join(f'"{name}"' for name in names) + "]"
    revision = f', revision="{facts.revision}"' if facts.revision else ""
    generates = architecture.endswith("ForCausalLM")
    if facts.base is None or not (generates or architecture.endswith("ForSequenceClassification")):
        return _python(
            "import lorakit",
            "",
            "# Fetches these adapters alone.",
            f'bank = lorakit.AdapterBank.from_pretrained("{facts.repo_id}"{revision}, adapters={listed})',
            "for name, adapter in bank.items():",
            "    print(name, adapter.method, adapter.rank, adapter.modules)",
        )
    rows = "[" + ", ".join(['"Hello"'] * len(names)) + "]"
    call = (
        (
            f"output = model.generate(**inputs, adapter_ids={listed}, max_new_tokens=32)",
            "print(tokenizer.batch_decode(output, skip_special_tokens=True))",
        )
        if generates
        else (f"print(model(**inputs, adapter_ids={listed}).logits)",)
    )
    return _python(
        "import lorakit",
        "from transformers import AutoTokenizer",
        "",
        f'base = "{facts.base}"',
        "# Fetches these adapters alone.",
        f'bank = lorakit.AdapterBank.from_pretrained("{facts.repo_id}"{revision}, adapters={listed})',
        "model = lorakit.MultiLoraModel.from_pretrained(base, bank)",
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f'inputs = tokenizer({rows}, return_tensors="pt")  # an adapter a row; None is the base',
        *call,
    )


def _peft_example(facts: Facts, architecture: str) -> str:
    name = next(iter(facts.index.adapters))
    base = f'"{facts.base}"' if facts.base else '"path/to/the/base"'
    revision = f', revision="{facts.revision}"' if facts.revision else ""
    return _python(
        "from peft import PeftModel",
        f"from transformers import {architecture}",
        "",
        f"base = {architecture}.from_pretrained({base})",
        f'model = PeftModel.from_pretrained(base, "{facts.repo_id}"{revision}, subfolder="adapters/{name}")',
    )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])
