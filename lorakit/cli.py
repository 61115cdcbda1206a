"""The command `lorakit`. A user's mistake is one sentence on standard error and exit code 2, never a traceback.

Each command imports what it needs when it runs: `--help` is immediate.
"""

from __future__ import annotations

import io
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lorakit import tenants as tenants_command
from lorakit.adapters.sizes import human_bytes
from lorakit.console import bar, make_console, table
from lorakit.errors import BaseModelNotFoundError, ConfigError, LorakitError, UnsupportedMethodError

app = typer.Typer(
    name="lorakit",
    help="Many PEFT adapters on one base model, any mix of them in one batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(tenants_command.app, name="tenants")

_MOST_ADAPTERS = 64  # that answer a prompt when none is named
_SHORTEST_KEY = 16

Bank = Annotated[Path, typer.Argument(help="The bank's folder.", show_default=False)]
Source = Annotated[str, typer.Argument(metavar="BANK", help="The bank: a folder or a Hub id.", show_default=False)]
Revision = Annotated[
    str | None, typer.Option(help="Of a bank on the Hub: a branch, a tag or a commit.", show_default=False)
]
Base = Annotated[
    str | None,
    typer.Option("--base", "-b", help="The base model: a folder or a Hub id. By default the one that is recorded."),
]


@app.command()
def export(
    bank: Bank,
    sources: Annotated[
        list[str],
        typer.Argument(help="PEFT folders or Hub ids, each as NAME=SOURCE or SOURCE.", show_default=False),
    ],
    base: Base = None,
    dtype: Annotated[str | None, typer.Option(help="Store A and B as float32, bfloat16 or float16.")] = None,
    svd_energy: Annotated[
        float | None,
        typer.Option(help="Approximate what has no exact form by SVD, keeping this share of its energy, as 0.999."),
    ] = None,
    task_id: Annotated[
        list[str] | None,
        typer.Option(help="The task of an adapter that has several, as NAME=2; repeat it.", show_default=False),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add to a bank that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Pack PEFT checkpoints into a bank."""
    from lorakit.adapters.bank import AdapterBank
    from lorakit.adapters.export import export as export_bank

    named = _named_sources(sources)
    options: dict[str, Any] = {
        "base_model": base,
        "dtype": _dtype(dtype),
        "svd_energy": svd_energy,
        "task_ids": _task_ids(task_id or []),
        "overwrite": overwrite,
    }
    with bar("export", len(named)) as step:
        if add:
            opened = AdapterBank.open(bank)
            opened.add_all(named, progress=step, **options)
        else:
            opened = export_bank(named, bank, progress=step, **options)
    _show(opened)


@app.command()
def inspect(
    bank: Source,
    adapter: Annotated[str | None, typer.Argument(help="Show one adapter's modules.", show_default=False)] = None,
    revision: Revision = None,
) -> None:
    """Show what a bank holds; only its index is read."""
    from lorakit.adapters.quantised import in_words

    opened = _look(bank, revision)
    if adapter is None:
        _show(opened, bank)
        return
    entry = opened[adapter]
    columns = ["module", "kind", "in", "out", "rank", "scale"]
    rows = [[m.path, m.kind, m.in_features, m.out_features, m.rank, f"{m.scale:g}"] for m in entry.layout.modules]
    if entry.svd_errors:
        columns.append("error")
        rows = [[*row, _error(entry.svd_errors.get(m.path))] for row, m in zip(rows, entry.layout.modules, strict=True)]
    dtype = str(entry.dtype).removeprefix("torch.")
    made = f", computed from a base {in_words(entry.base_quantisation)}" if entry.uses_base_weights else ""
    title = f"{entry.name}: {_method(entry)}, {dtype}, {human_bytes(entry.nbytes)}, from {entry.source}{made}"
    make_console().print(table(title, columns, rows))


@app.command()
def verify(
    bank: Source,
    adapters: Annotated[list[str] | None, typer.Argument(help="Only these.", show_default=False)] = None,
    revision: Revision = None,
) -> None:
    """Read a bank whole and compare it with its index: sizes, hashes, finite weights."""
    from lorakit.adapters.bank import AdapterBank

    opened = AdapterBank.from_pretrained(bank, revision=revision, adapters=adapters or None)
    with bar("verify", len(adapters or opened.names)) as step:
        opened.verify(adapters or None, progress=step)
    make_console().print(f"{len(adapters or opened.names)} adapters are sound.")


@app.command()
def remove(bank: Bank, adapters: Annotated[list[str], typer.Argument(show_default=False)]) -> None:
    """Remove adapters from a bank and free their bytes."""
    from lorakit.adapters.bank import AdapterBank

    opened = AdapterBank.open(bank)
    opened.remove(*adapters)
    opened.compact()
    _show(opened)


@app.command()
def merge(
    bank: Bank,
    name: Annotated[str, typer.Argument(help="The new adapter's name.", show_default=False)],
    weights: Annotated[
        list[str], typer.Argument(help="Adapters and their weights, each as NAME=WEIGHT.", show_default=False)
    ],
    combination: Annotated[
        str, typer.Option("--combination", "-c", help="How they are summed: linear, cat, svd, ties, …")
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="The rank of a sum by singular values (svd, …_svd).")] = None,
    density: Annotated[float | None, typer.Option(help="The share of values that pruning keeps.")] = None,
    majority_sign_method: Annotated[str, typer.Option(help="How ties elects a sign: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="Of the values that dare drops.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Store A and B as float32, bfloat16 or float16.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter of this name.")] = False,
) -> None:
    """Add a weighted sum of adapters to their bank, as one adapter."""
    from lorakit.adapters.bank import AdapterBank

    opened = AdapterBank.open(bank)
    opened.merge(
        name,
        _weights(weights),
        combination=combination,
        rank=rank,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
        dtype=_dtype(dtype),
        overwrite=overwrite,
    )
    _show(opened)


@app.command("export-peft")
def export_peft(
    bank: Source,
    adapter: Annotated[str, typer.Argument(show_default=False)],
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    base: Base = None,
    revision: Revision = None,
) -> None:
    """Write an adapter of a bank back as a PEFT checkpoint."""
    from lorakit.adapters.bank import AdapterBank

    opened = AdapterBank.from_pretrained(bank, revision=revision, adapters=[adapter])
    written = opened.export_peft(adapter, out, base_model=base)
    make_console().print(f"wrote {written}", markup=False)


@app.command()
def push(
    bank: Bank,
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="As user/bank; made if new.", show_default=False)],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="A new repository's; by default as its owner's are.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; by default main.", show_default=False)] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's.", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    include_peft: Annotated[
        bool | None,
        typer.Option("--include-peft/--no-peft", help="PEFT folders too; by default if the repository has them."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base", "-b", help="The base's Hub id, for the card; by default the one that is recorded."),
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="An adapter's score, for the card, as NAME=VALUE; repeat it.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take away adapters that this bank lacks.")] = False,
) -> None:
    """Push a bank to the Hub, with a model card."""
    from lorakit.adapters.bank import AdapterBank

    commit = AdapterBank.open(bank).push_to_hub(
        repo_id,
        private=private,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
        include_peft=include_peft,
        overwrite=overwrite,
        base_model=base_model,
        scores=_scores(score or []),
    )
    make_console().print(commit.pr_url or commit.commit_url, markup=False, soft_wrap=True)


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="The bank's Hub id.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="Only this one; repeat it for more.", show_default=False),
    ] = None,
    revision: Revision = None,
) -> None:
    """Copy a bank of the Hub, or some of its adapters, into a folder where it can be changed."""
    from lorakit.adapters.bank import AdapterBank
    from lorakit.adapters.folder import check_free

    check_free(folder, overwrite=False)
    _show(AdapterBank.from_pretrained(repo_id, revision=revision, adapters=adapter or None).copy(folder))


@app.command()
def generate(
    bank: Source,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", show_default=False)],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="An adapter; repeat it for more. By default all.", show_default=False),
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Let the base answer too.")] = False,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    revision: Revision = None,
) -> None:
    """Answer prompts by several adapters in one batch: every prompt by every adapter."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from lorakit import chat
    from lorakit.adapters.bank import AdapterBank
    from lorakit.runtime.model import MultiLoraModel

    if not all(prompts):
        raise ConfigError("a prompt is empty; write what shall be answered.")
    if not math.isfinite(temperature):
        raise ConfigError(f"--temperature is {temperature}; give a finite number of at least 0.")
    opened = _look(bank, revision)
    if not adapter and len(opened) > _MOST_ADAPTERS:
        raise ConfigError(f"the bank {bank} holds {len(opened)} adapters; name some of them with --adapter.")
    names: list[str | None] = [*(adapter or opened.names)]
    if with_base or not names:
        names.append(None)
    for name in names:
        _ = name is None or opened[name]  # refuses an unknown one before the model is loaded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = base or opened.base_id
    if not source:
        raise BaseModelNotFoundError(f"the bank {bank} does not say where its base model is; give it with --base.")
    disable_progress_bar()
    with make_console(stderr=True).status("loading the base model"):
        tokenizer = _tokenizer(source)
        opened = AdapterBank.from_pretrained(bank, revision=revision, adapters={*adapter} if adapter else None)
        model = MultiLoraModel.from_pretrained(source, opened).to(device)
    if not model.model.can_generate():
        raise UnsupportedMethodError(
            f"the bank {bank} is for a {type(model.model).__name__}, which generates no text; call it from Python."
        )
    rows = [(prompt, name) for prompt in prompts for name in names]
    inputs = chat.encode(tokenizer, [prompt for prompt, _ in rows]).to(device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    with bar(f"generate {len(rows)} rows", max_new_tokens) as step:
        output = model.generate(
            **inputs,
            **sampling,
            adapter_ids=[name for _, name in rows],
            max_new_tokens=max_new_tokens,
            stopping_criteria=chat.each_token(step),
        )
    # An encoder-decoder answers in a sequence of its own.
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answers = chat.decode(tokenizer, output, start)
    shown = [[prompt, name or "(base)", answer] for (prompt, name), answer in zip(rows, answers, strict=True)]
    make_console().print(table("", ["prompt", "adapter", "answer"], shown))


@app.command()
def serve(
    base: Annotated[str, typer.Argument(help="The base model: a folder or a Hub id.", show_default=False)],
    bank: Annotated[str, typer.Option("--bank", help="The bank: a folder or a Hub id.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="The base's name for clients; by default its Hub id, or its folder's name.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    dtype: Annotated[str, typer.Option(help="The base's: auto, float32, bfloat16 or float16.")] = "auto",
    attention: Annotated[
        str | None, typer.Option(help="transformers' implementation, such as flash_attention_3.", show_default=False)
    ] = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Sequences of a batch.", show_default=False)] = None,
    request_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds after which a request fails.", show_default=False)
    ] = None,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that requests have to end on SIGTERM.")] = 30.0,
    tenants: Annotated[
        Path | None,
        typer.Option(help="A file of tenants, see lorakit tenants: callers need keys.", show_default=False),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="LORAKIT_ADMIN_KEY",
            help="Lets its bearer load and unload adapters. Other users of the machine can read a command line, so set "
            "the variable.",
            show_default=False,
        ),
    ] = None,
    adapter_root: Annotated[
        list[Path] | None,
        typer.Option(help="A folder from below which adapters may be loaded; repeat it.", show_default=False),
    ] = None,
    adapter_hub: Annotated[bool, typer.Option("--adapter-hub", help="Adapters may be loaded from the Hub.")] = False,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    revision: Revision = None,
    replicas: Annotated[
        str | None,
        typer.Option(help="Engines on Ray, a GPU each: a number, or 1:8 for what the load needs.", show_default=False),
    ] = None,
    replica_gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of a replica, which share the base by tensor parallelism.", show_default=False),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster's; by default RAY_ADDRESS, or this machine alone.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the scheduling policy, as linger=20; repeat it.", show_default=False),
    ] = None,
) -> None:
    """Serve a bank over HTTP, by OpenAI's routes."""
    _need_server()
    from lorakit.adapters.dtypes import WEIGHT_NAMES
    from lorakit.engine.config import EngineConfig
    from lorakit.server.serve import Settings
    from lorakit.server.serve import serve as run

    if dtype not in ("auto", *WEIGHT_NAMES):
        raise ConfigError(f"--dtype {dtype!r} is unknown; use one of auto, {', '.join(WEIGHT_NAMES)}.")
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format {log_format!r} is unknown; use text or json.")
    if admin_key is not None and len(admin_key) < _SHORTEST_KEY:
        raise ConfigError(f"the administrator's key is shorter than {_SHORTEST_KEY} characters; make a longer one.")
    if admin_key is None and (adapter_root or adapter_hub):
        raise ConfigError("--adapter-root and --adapter-hub are the administrator's; set LORAKIT_ADMIN_KEY.")
    if replicas is None and (replica_gpus is not None or ray_address is not None or set_):
        raise ConfigError("--replica-gpus, --ray-address and --set are of replicas; give --replicas, too.")
    many = None
    if replicas is not None:
        _need("several replicas need", ["ray"], extra="ray")
        from lorakit.scheduler.settings import make_policy
        from lorakit.server.replicas import Replicas, fleet_of, numbers_of

        least, most = numbers_of(replicas)
        many = Replicas(make_policy([*fleet_of(least, most), *(set_ or [])], most=most), ray_address, replica_gpus)
    _look(bank, revision)  # refuses what is no bank before anything is loaded
    run(
        Settings(
            base,
            bank,
            revision=revision,
            name=name,
            host=host,
            port=port,
            dtype=dtype,
            attention=attention,
            request_timeout=request_timeout,
            drain=drain,
            tenants=tenants,
            admin_key=admin_key,
            adapter_roots=adapter_root or (),
            adapter_hub=adapter_hub,
            log_format="json" if log_format == "json" else "text",
            engine=EngineConfig(max_requests=max_requests),
            replicas=many,
        )
    )


@app.command()
def demo(
    base: Annotated[
        str | None,
        typer.Argument(help="The base model: a folder or a Hub id. By default the quickstart's.", show_default=False),
    ] = None,
    bank: Annotated[Path | None, typer.Option("--bank", help="The bank of its tenants.", show_default=False)] = None,
    folder: Annotated[Path, typer.Option(help="Where the quickstart's tenants are, or come to be.")] = Path(
        "quickstart"
    ),
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free from 7860 on.", show_default=False)
    ] = None,
) -> None:
    """Show a page on which tenants answer side by side, from one batch."""
    _need("the demo needs", ["gradio", "fastapi"], extra="demo")
    if (base is None) != (bank is None):
        raise ConfigError("a base and a bank belong together: lorakit demo BASE --bank BANK, or neither.")
    prompts: list[str] = []
    if base is None:
        _need("the quickstart's tenants need", ["trl", "datasets", "yaml", "matplotlib"], extra="quickstart")
        from lorakit.quickstart import prepare

        found, opened, tasks = prepare(folder)
        base, bank = str(found), opened.path
        prompts = [prompt for task in tasks for prompt in task.dataset("held_out", 2, 0)["prompt"]]
    from lorakit.demo.app import serve as show
    from lorakit.demo.stage import Stage

    assert base is not None and bank is not None
    with Stage.open(base, bank, prompts=prompts) as stage:
        show(stage, host=host, port=port)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A recipe's YAML file.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, as KEY=VALUE; repeat it.", show_default=False)
    ] = None,
) -> None:
    """Fine-tune an adapter by a recipe."""
    _need("lorakit.recipes needs", ["trl", "datasets", "yaml", "matplotlib"], extra="train")
    import yaml

    from lorakit.recipes import FinetuneConfig
    from lorakit.recipes.finetune import finetune

    changes = {}
    for item in set_ or []:
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} is no KEY=VALUE.")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is no YAML; quote it.") from error
    settings = FinetuneConfig.from_yaml(config)
    if changes:
        settings = FinetuneConfig.from_dict({**settings.to_dict(), **changes})
    folder = finetune(settings)
    make_console().print(f"adapter in {folder}, its loss in {folder / 'loss.png'}", markup=False)


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where runs, bank and results go.")] = Path("quickstart"),
    held_out: Annotated[int, typer.Option(min=1, help="Held-out inputs a tenant.")] = 20,
) -> None:
    """Fine-tune three tenants, pack them, and answer all of them in one batch. Minutes on a CPU."""
    _need("the quickstart needs", ["trl", "datasets", "yaml", "matplotlib", "faker", "num2words"], extra="quickstart")
    from lorakit.quickstart import quickstart as run

    run(folder, held_out=held_out)


@app.command()
def simulate(
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="A trace as JSON lines; by default an hour like that of Punica's paper.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the report: a page, its numbers as JSON, plots.")] = Path(
        "simulation"
    ),
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", "-s", help="A scheme to compare; repeat it. By default all.", show_default=False),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs there are at most.")] = 16,
    costs: Annotated[
        str, typer.Option(help="What work takes: h100-llama-2-7b and others that come with lorakit, or a file.")
    ] = "h100-llama-2-7b",
    batch: Annotated[int, typer.Option(min=1, help="Requests of a working set at most.")] = 32,
    blocks: Annotated[int, typer.Option(min=2, help="Blocks of a GPU's cache, of 16 tokens each.")] = 4096,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters that a GPU's memory holds.")] = 256,
    rank: Annotated[
        list[int] | None,
        typer.Option(min=1, help="The adapters' rank; several are theirs in turn.", show_default=False),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the policy, as linger=20; repeat it.", show_default=False),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="The target of Ray Serve's autoscaler, for schemes without a scaling of their own; 0: a fixed fleet.",
            show_default="Ray's default, 2",
        ),
    ] = None,
    start: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds until a GPU serves.", show_default=False)
    ] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="Of the hour made: the most requests a second.")] = 85.0,
    minutes: Annotated[float, typer.Option(min=0.01, help="Of the hour made: its length.")] = 60.0,
    popularity: Annotated[
        str, typer.Option(help="Of the hour made: distinct, uniform, skewed or identical.")
    ] = "skewed",
    lengths: Annotated[str, typer.Option(help="Of the hour made: chat, punica or slora.")] = "chat",
    seed: Annotated[int, typer.Option(help="Of the hour made, and of schemes that draw.")] = 0,
    write: Annotated[Path | None, typer.Option(help="Write the trace here, too.", show_default=False)] = None,
) -> None:
    """Play a trace on simulated GPUs, scheme beside scheme."""
    _need("a report needs", ["matplotlib"], extra="simulate")
    from lorakit import workloads
    from lorakit.scheduler.report import numbers, rows, write_report
    from lorakit.scheduler.schemes import SCHEMES, Autoscaler, make_scheme
    from lorakit.scheduler.settings import make_costs, make_policy
    from lorakit.scheduler.simulator import Hardware
    from lorakit.scheduler.simulator import simulate as play
    from lorakit.scheduler.snapshot import Limits
    from lorakit.scheduler.summary import bounds

    if not all(map(math.isfinite, (rate, minutes, start or 0.0, target or 0.0))):
        raise ConfigError("--rate, --minutes, --start and --target have to be finite numbers.")
    policy = make_policy(set_ or [], most=gpus)
    limits, hardware = Limits(batch, blocks), Hardware(make_costs(costs, start), adapters, tuple(rank or [16]))
    autoscaler = None if target == 0 else Autoscaler() if target is None else Autoscaler(target)
    names = scheme or list(SCHEMES)
    for name in names:
        make_scheme(name, policy, limits, autoscaler, seed)  # refuses an unknown one before anything is played
    asked = (
        workloads.read_trace(trace) if trace else workloads.punica_hour(rate, minutes * 60, popularity, lengths, seed)
    )
    if write is not None:
        workloads.write_trace(asked, write)
    outcomes = {}
    with bar("simulate", len(names)) as step:
        for done, name in enumerate(names):
            sample = max(asked[-1].arrival, 1.0) / 720
            outcomes[name] = play(asked, make_scheme(name, policy, limits, autoscaler, seed), hardware, sample=sample)
            step(done + 1)
    least = bounds(asked, hardware, limits)
    setting = {
        "trace": str(trace) if trace else f"{popularity}, {lengths}, up to {rate:g} requests/s, seed {seed}",
        "requests": len(asked),
        "costs": costs,
        "batch": batch,
        "blocks": blocks,
        "policy": str(policy),
        "autoscaler": str(autoscaler),
    }
    path = write_report(out, outcomes, least, setting)
    columns, lines = rows(numbers(outcomes, least))
    shown = [columns[:5], *(line[:5] for line in lines)]
    clairvoyant = f"{least['clairvoyant_gpu_hours']:.2f} GPU-hours"
    title = f"{len(asked):,} requests on up to {gpus} GPUs; the clairvoyant takes {clairvoyant}"
    console = make_console()
    console.print(table(title, shown[0], shown[1:]))
    console.print(f"report in {path}", markup=False)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the results (JSON) and plots go.")] = Path("benchmarks"),
) -> None:
    """Measure speed and memory on this machine, side by side with PEFT."""
    _need("benchmarks need", ["matplotlib", "psutil"], extra="bench")
    from lorakit.bench import BENCHMARKS

    unknown = sorted(set(names or []) - BENCHMARKS.keys())
    if unknown:
        raise ConfigError(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}.")
    for name in names or BENCHMARKS:
        BENCHMARKS[name](out)


def _named_sources(sources: list[str]) -> dict[str, str]:
    """NAME=SOURCE or SOURCE → name → source; a name that comes twice is left for export to refuse."""
    from lorakit.adapters.names import is_name
    from lorakit.adapters.peft_reader import default_name
    from lorakit.errors import AdapterExistsError

    named: dict[str, str] = {}
    for item in sources:
        name, equals, source = item.partition("=")
        if not equals or not (is_name(name) or not Path(item).exists()):
            name, source = default_name(item), item
        if not source:
            raise ConfigError(f"{item!r} names no source; write NAME=SOURCE or SOURCE.")
        if name in named:
            raise AdapterExistsError(f"two sources would be called {name!r}; name them apart, as NAME=SOURCE.")
        named[name] = source
    return named


def _task_ids(items: list[str]) -> dict[str, int]:
    """NAME=TASK → name → task."""
    tasks: dict[str, int] = {}
    for item in items:
        name, _, value = item.partition("=")
        if name in tasks:
            raise ConfigError(f"adapter {name!r} has two tasks; give it one, or export it under two names.")
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise ConfigError(f"--task-id {item!r} is no NAME=TASK, such as sql=2.")
        tasks[name] = int(value)
    return tasks


def _weights(items: list[str]) -> dict[str, float]:
    """NAME=WEIGHT → name → weight."""
    weights: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition("=")
        if name in weights:
            raise ConfigError(f"adapter {name!r} has two weights; give it one.")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"{item!r} is no NAME=WEIGHT, such as sql=0.7.") from error
    return weights


def _scores(items: list[str]) -> dict[str, str]:
    """NAME=VALUE → name → value."""
    scores: dict[str, str] = {}
    for item in items:
        name, _, value = item.partition("=")
        if name in scores:
            raise ConfigError(f"adapter {name!r} has two scores; give it one.")
        if not value:
            raise ConfigError(f"--score {item!r} is no NAME=VALUE, such as sql=0.93.")
        scores[name] = value
    return scores


def _look(bank: str, revision: str | None) -> Any:
    """A bank whose index is read, and nothing else."""
    from lorakit.adapters.bank import AdapterBank

    if not Path(bank).exists():
        from lorakit.adapters.hub import is_repo_id

        if is_repo_id(bank):
            from lorakit.adapters.pull import look

            return AdapterBank(look(bank, revision))
    return AdapterBank.from_pretrained(bank, revision=revision)


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    from lorakit.adapters.dtypes import WEIGHT_NAMES

    if name not in WEIGHT_NAMES:
        raise ConfigError(f"--dtype {name!r} is unknown; use one of {', '.join(WEIGHT_NAMES)}.")
    return WEIGHT_NAMES[name]


def _tokenizer(source: str) -> Any:
    from lorakit.server.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(source, remedy="save one beside it, or name another base with --base")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise BaseModelNotFoundError(
            f"the tokenizer of the base model {source!r} has neither a padding nor an end token, so prompts cannot be "
            "batched; set its pad_token and save it again."
        )
    return tokenizer


def _show(bank: Any, name: str | None = None) -> None:
    info = bank.info()
    approximated = any(entry.svd_errors for entry in info.adapters)
    rows = []
    for entry in info.adapters:
        ranks, dtype = "/".join(map(str, entry.ranks)), str(entry.dtype).removeprefix("torch.")
        size = human_bytes(entry.nbytes)
        method = f"{_method(entry)} on {entry.base_quantisation}" if entry.base_quantisation else _method(entry)
        row = [entry.name, method, ranks, len(entry.modules), dtype, size, entry.source]
        rows.append([*row, _error(entry.svd_error if entry.svd_errors else None)] if approximated else row)
    dead = f", {human_bytes(info.dead_nbytes)} of it removed" if info.dead_nbytes else ""
    base = Path(info.base_id)
    if base.is_absolute() and base.is_relative_to(Path.cwd()):
        base = base.relative_to(Path.cwd())
    title = f"{name or info.path}: {len(rows)} adapters of {base}, {human_bytes(info.nbytes)}{dead}"
    columns = ["adapter", "method", "rank", "modules", "dtype", "size", "source", *(["error"] if approximated else [])]
    make_console().print(table(title, columns, rows))


def _method(entry: Any) -> str:
    """An adapter's method, with the task that was chosen."""
    return entry.method if entry.task_id is None else f"{entry.method} (task {entry.task_id})"


def _error(error: float | None) -> str:
    """What an approximation lost, or that nothing was."""
    return "exact" if error is None else f"{error:.1e}"


def _need_server() -> None:
    _need("the server needs", ["fastapi", "limits", "prometheus_client", "pythonjsonlogger", "uvicorn"], extra="server")


def _need(what: str, packages: list[str], *, extra: str) -> None:
    import importlib.util

    from lorakit.errors import MissingDependencyError

    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingDependencyError(f"{what} {', '.join(missing)}: pip install 'lorakit[{extra}]'.")


def main() -> None:
    """The console script."""
    # What the libraries below say of their own inner life is no news to a user of the command.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    # File names can hold bytes that are no text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except LorakitError as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}. Check the path, its permissions and the free space.")


def _fail(message: str) -> NoReturn:
    from rich.text import Text

    sentence = " ".join(message.split())
    make_console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {sentence}"), soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:
        # What cannot be written would be tried once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)
