"""cluster: Punica's cluster experiment in small, run for real and simulated, side by side.

A load that rises from nearly nothing to what all replicas can just carry, and falls again: the GPUs in use follow it.
The same trace is served by a `Cluster` on Ray, with real engines, and played by the simulator, with the costs of these
engines and the same policy. On a host with GPUs a replica is one of them, with Llama-2-7B's shape; where there is none,
it is a process with one thread and a tiny Llama, which tries the cluster and says nothing of GPUs.

The costs that the simulator is told, and by which the load is chosen, are a saved fit for the GPU if there is one; else
the forwards of replicas are measured first, of as many at the same time as there will be. The time that a replica takes
to start is that of the real run. A second simulation has all forwards take so many times longer that the mean time
between tokens is the real run's: what then still differs is no matter of costs.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from lorakit.adapters import fingerprint
from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.base import BaseModel
from lorakit.bench import engine_costs, open_loop
from lorakit.bench.harness import save_cells, show
from lorakit.bench.llamas import Llama, with_liger
from lorakit.bench.open_loop import Run
from lorakit.bench.plots import fleets
from lorakit.bench.random_bank import RandomBank
from lorakit.bench.served import allow_compiling, engine_config
from lorakit.bench.simulator import COSTS
from lorakit.console import bar, make_console
from lorakit.engine.engine import Engine
from lorakit.runtime.model import MultiLoraModel
from lorakit.scheduler.catalog import Catalog
from lorakit.scheduler.cluster import Cluster
from lorakit.scheduler.config import ClusterConfig
from lorakit.scheduler.costs import SECOND, Costs, read_costs
from lorakit.scheduler.policy import Policy, spare_of
from lorakit.scheduler.sample import Sample
from lorakit.scheduler.schemes import Punica
from lorakit.scheduler.simulator import Hardware, Outcome, simulate
from lorakit.scheduler.snapshot import Limits
from lorakit.scheduler.summary import first_tokens, gap_quantiles, over_time, summary
from lorakit.workloads import Asked, adapters_of, punica_lengths, trace, wave_arrivals

REAL, SIMULATED, SLOWED = "real", "simulated", "simulated, as slow as the real one"

_POINTS = 240
"""Of a series that is saved."""


class Setting(NamedTuple):
    """What is asked for, and of whom.

    Attributes:
        replicas: the most.
        batch: requests of a replica at most.
        tokens: for so many in each row a replica's cache has room.
        seconds: of the trace.
        share: of what all replicas can carry, the load at its highest.
        shorter: prompts and answers are so many times shorter than Punica's.
        linger: seconds for which an empty replica stays.
        consolidate_every: seconds between two consolidations.
        adapters: in the bank.
        costs: a fit that comes with lorakit, or a file; None: they are measured.
        rounds: of that measurement.
        seed: of the trace.
    """

    replicas: int
    batch: int = 32
    tokens: int = 1536
    seconds: float = 420.0
    share: float = 0.85
    shorter: int = 1
    linger: float = Policy.linger
    consolidate_every: float = 5.0
    adapters: int = 32
    costs: str | None = None
    rounds: int = 3
    seed: int = 0

    @property
    def policy(self) -> Policy:
        """Punica's, its defaults but for what depends on the number of replicas and on their batch."""
        spare = spare_of(self.replicas, self.batch)
        return Policy(most=self.replicas, spare=spare, linger=self.linger, consolidate_every=self.consolidate_every)

    def lengths(self, rng: random.Random) -> tuple[int, int]:
        """Punica's, shorter."""
        prompt, answer = punica_lengths(rng)
        return max(2, prompt // self.shorter), max(1, answer // self.shorter)


SMALL = Llama(
    shape={
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
    },
    dtype=torch.float32,
    attention="sdpa",
)
"""The base where there is no GPU."""

_PROCESSES = Setting(
    replicas=2, batch=8, tokens=256, seconds=180.0, share=0.65, shorter=16, linger=10.0, consolidate_every=2.0
)


def run(folder: Path) -> None:
    """Measures, prints, and saves a cell of `cluster.json` and a plot. Minutes; says so where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        make_console().print("cluster: left out, it needs Ray")
        return
    gpus = torch.cuda.device_count()
    if gpus:
        run_cell(folder, Llama(), Setting(replicas=gpus, costs=COSTS.get(torch.cuda.get_device_name())))
    else:
        run_cell(folder, SMALL, _PROCESSES)


def run_cell(folder: Path, llama: Llama, setting: Setting) -> None:
    """The same for any base and fleet."""
    from lorakit.scheduler.ray_cluster import RayLinks, RaySettings, connected

    say = make_console().print
    with tempfile.TemporaryDirectory(prefix="lorakit-cluster-") as place:
        # In a process of its own, which ends before replicas begin: they have GPUs to themselves.
        say("cluster: makes a bank")
        bank_folder = Path(place) / "bank"
        _in_a_process(_write_bank, llama, setting, bank_folder)
        bank = AdapterBank.open(bank_folder)

        def on_ray(setting: Setting, number: int = -1) -> Cluster:
            catalog = Catalog(bank, str(bank.base_id))
            make = partial(make_replica, llama, setting, dict(bank.fingerprint), number=number)
            return cluster_of(RayLinks(make, catalog.folders, RaySettings()), catalog, llama, setting)

        with connected():
            if setting.costs is None:
                say("cluster: measures what forwards take")
                one = setting._replace(replicas=1)
                costs = measure(
                    [partial(on_ray, one, number) for number in range(setting.replicas)], bank.names, llama, setting
                )
            else:
                costs = read_costs(setting.costs)
            say("cluster: starts the first replica")
            with on_ray(setting) as cluster:
                results = compare(cluster, bank.names, llama, setting, costs)
    report(folder, llama, setting, results)


def cluster_of(links: Any, catalog: Catalog, llama: Llama, setting: Setting) -> Cluster:
    """A cluster of the setting's replicas, over any links."""
    return Cluster(links, catalog, LlamaConfig(**llama.shape), setting.policy, ClusterConfig(max_waiting=1 << 20))


def measure(clusters: Sequence[Callable[[], Cluster]], names: Sequence[str], llama: Llama, setting: Setting) -> Costs:
    """The costs of replicas that are all measured at the same time: on a CPU they share it.

    Args:
        clusters: make one of one replica each.
        names: the adapters.
        llama: the base.
        setting: the batch, and how often.
    """
    longest = max(16, 1024 // setting.shorter)

    def one(cluster: Cluster) -> engine_costs.Measured:
        return engine_costs.measure(
            cluster, setting.batch, names, llama.rank, llama.vocabulary, longest, setting.rounds
        )

    with ExitStack() as opened, ThreadPoolExecutor(len(clusters)) as pool:
        started = [opened.enter_context(make()) for make in clusters]  # one by one, as Serve begins with the first
        return engine_costs.costs_of(pool.map(one, started))


def compare(cluster: Cluster, names: Sequence[str], llama: Llama, setting: Setting, costs: Costs) -> dict[str, Any]:
    """Serves a trace for real and simulates it.

    Args:
        cluster: serves nobody yet.
        names: the adapters.
        llama: the base.
        setting: the load.
        costs: of a replica's forwards.

    Returns:
        What is saved: both runs, and the simulation as slow as the real one, in numbers and over time.
    """
    limits = cluster.limits
    hardware = Hardware(costs, slots=max(setting.adapters, limits.batch), ranks=(llama.rank,))
    able = capacity(setting, hardware, limits)
    rate = setting.share * setting.replicas * able
    asked = make_trace(setting, rate, len(names))
    # Once beforehand, on the replica that is there: what is compiled and captured on the way.
    warm = [replace(one, arrival=0.0, new_tokens=min(8, one.new_tokens)) for one in asked[: limits.batch]]
    open_loop.serve(cluster, warm, names, llama.vocabulary)
    with bar(f"{len(asked):,} requests", len(asked)) as ended:
        run = open_loop.serve(cluster, asked, names, llama.vocabulary, ended=ended)
    starts = open_loop.starts(run.samples)
    if starts:
        hardware = replace(hardware, costs=replace(costs, start=round(statistics.median(starts) * SECOND)))
    every = max(0.5, setting.seconds / _POINTS)
    play = partial(simulate, asked, sample=every, gaps=True)
    outcome = play(Punica(setting.policy, limits), hardware)
    real, factor, slowed = open_loop.summary(run), 1.0, outcome
    for _ in range(3):  # batches are others when forwards take longer
        factor *= max(1e-3, real["between_tokens_ms"]["mean"]) / _numbers(slowed)["between_tokens_ms"]["mean"]
        slowed = play(Punica(setting.policy, limits), replace(hardware, costs=hardware.costs.times(factor)))
    return {
        "requests": len(asked),
        "adapters_asked_for": len({one.adapter for one in asked}),
        "capacity_of_a_replica_per_s": able,
        "peak_per_s": rate,
        "limits": asdict(limits),
        "starts_s": starts,
        "costs_ms": {
            name: value / SECOND * 1e3 for name, value in asdict(hardware.costs).items() if name != "prompt_budget"
        },
        "forwards_took_times": factor,
        REAL: {**real, "first_tokens_s": _windows_of(run, setting)},
        SIMULATED: {**_numbers(outcome), "first_tokens_s": over_time(outcome, _window(setting))},
        SLOWED: {**_numbers(slowed), "first_tokens_s": over_time(slowed, _window(setting))},
        "series": {
            "requested_per_s": {"every_s": _window(setting), "values": requested(asked, _window(setting))},
            REAL: _series(open_loop.thinned(open_loop.numbered(run.samples), every)),
            SIMULATED: _series(outcome.samples),
            SLOWED: _series(slowed.samples),
        },
    }


def capacity(setting: Setting, hardware: Hardware, limits: Limits) -> float:
    """Requests a second that one replica can carry: of many that are all there from the beginning."""
    rng = random.Random(setting.seed)
    count = 64 * limits.batch
    asked = trace([0.0] * count, adapters_of(count, "skewed", rng), setting.lengths, rng)
    outcome = simulate(asked, Punica(Policy(most=1), limits), hardware, sample=None)
    return count / (outcome.end / SECOND)


def make_trace(setting: Setting, rate: float, adapters: int) -> list[Asked]:
    """A load that rises to a rate and falls again; adapters of skewed popularity, as many as there are at most."""
    rng = random.Random(setting.seed)
    arrivals = wave_arrivals(rate, setting.seconds, rng)
    wanted = [adapter % adapters for adapter in adapters_of(len(arrivals), "skewed", rng)]
    return trace(arrivals, wanted, setting.lengths, rng)


def requested(asked: Sequence[Asked], seconds: float) -> list[float]:
    """Requests a second in each window of so many seconds."""
    counts = [0] * (1 + int(asked[-1].arrival / seconds))
    for one in asked:
        counts[int(one.arrival / seconds)] += 1
    return [count / seconds for count in counts]


def report(folder: Path, llama: Llama, setting: Setting, results: dict[str, Any]) -> None:
    """Saves a cell and its plot, and prints it."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"
    cell = f"{setting.replicas} x {where}"
    path, cells = save_cells("cluster", folder, cell, {**llama.as_json(), **setting._asdict()}, results)
    draw(folder, cell, cells[cell])
    rows = [[kind, *(shown(results[kind]) for shown in _COLUMNS.values())] for kind in (REAL, SIMULATED, SLOWED)]
    show(cell, ["", *(name.strip() for name in _COLUMNS)], rows, path)


def draw(folder: Path, cell: str, saved: Mapping[str, Any]) -> None:
    """Draws a cell as it is saved."""
    setting, series, environment = saved["setting"], saved["results"]["series"], saved["environment"]
    load = series["requested_per_s"]
    shape = f"a Llama of {setting['shape']['num_hidden_layers']} layers of {setting['shape']['hidden_size']}"
    host = "" if environment["gpu"] else f" ({environment['cores']} cores of an {environment['cpu']})"
    fleets(
        folder / f"cluster_{cell.lower().replace(' ', '_')}.png",
        f"{cell}{host}, {shape}, {saved['results']['requests']:,} requests",
        ([load["every_s"] * (place + 0.5) for place in range(len(load["values"]))], load["values"]),
        {name: _samples(series[name]) for name in (REAL, SIMULATED, SLOWED)},
        setting["batch"],
    )


_COLUMNS = {
    "answered": lambda one: f"{one['answered']:,}",
    "replica-hours": lambda one: f"{one['gpu_hours']:.3f}",
    "tokens/s": lambda one: f"{one['tokens_per_s']:.0f}",
    "first token p50": lambda one: f"{one['first_token_s']['p50']:.3f} s",
    "p99": lambda one: f"{one['first_token_s']['p99']:.2f} s",
    "between tokens p50": lambda one: f"{one['between_tokens_ms']['p50']:.1f} ms",
    "p99 ": lambda one: f"{one['between_tokens_ms']['p99']:.1f} ms",
    "moves": lambda one: str(one["moves"]),
}


# ---- in processes of their own


def make_replica(llama: Llama, setting: Setting, facts: dict[str, Any] | None, *, number: int = -1) -> Engine:
    """A replica's engine, whose adapters come from the cluster: the same random base in every process.

    Args:
        llama: the base.
        setting: batch and cache.
        facts: the fingerprint that the bank was made for; None: there is no bank yet.
        number: tells clusters apart that begin at the same time.

    Raises:
        BaseModelMismatchError: random weights are others here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    allow_compiling()
    torch.manual_seed(0)
    base = llama.build(device)
    if facts is not None:
        fingerprint.check(BaseModel.of(base), facts, owner="the bank")
    if device.type == "cuda":
        with_liger(base, "cluster")
    cache = llama.cache_bytes(setting.batch, setting.tokens)
    config = replace(engine_config(setting.batch, cache, device), cache_memory=cache)
    return Engine(MultiLoraModel(base), config)


def _write_bank(llama: Llama, setting: Setting, folder: Path) -> None:
    base = make_replica(llama, setting, None).model.model
    RandomBank(base, setting.adapters, rank=llama.rank, dtype=llama.dtype, contents=setting.adapters).on_disk(folder)


def _in_a_process(work: Callable[..., None], *args: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(work, *args).result()


# ---- results


def _series(samples: Sequence[Sample]) -> dict[str, Any]:
    replicas = sorted({number for sample in samples for number in sample.working_sets})
    return {
        "seconds": [round(sample.seconds, 2) for sample in samples],
        "replicas": [sample.gpus for sample in samples],
        "waiting": [sample.waiting for sample in samples],
        "working_sets": {str(one): [sample.working_sets.get(one) for sample in samples] for one in replicas},
    }


def _samples(series: dict[str, Any]) -> list[Sample]:
    """The samples of a series that was saved."""
    sets = series["working_sets"]
    return [
        Sample(
            second, count, waiting, {int(one): sizes[place] for one, sizes in sets.items() if sizes[place] is not None}
        )
        for place, (second, count, waiting) in enumerate(
            zip(series["seconds"], series["replicas"], series["waiting"], strict=True)
        )
    ]


def _window(setting: Setting) -> float:
    return setting.seconds / 60


def _windows_of(run: Run, setting: Setting) -> dict[str, list[float]]:
    answered = (one for one in run.served if one.error is None)
    return first_tokens(((one.arrival, one.times[0] - one.arrival) for one in answered), _window(setting))


def _numbers(outcome: Outcome) -> dict[str, Any]:
    found = summary(outcome)
    taken = sum(end - job.first for job, end in zip(outcome.jobs, outcome.finished, strict=True))
    mean = taken / max(1, sum(job.new_tokens - 1 for job in outcome.jobs)) / SECOND * 1e3
    gaps = {**gap_quantiles(outcome.counts.gaps or ()), "mean": mean}
    return {**found, "answered": found["requests"], "between_tokens_ms": gaps}
