"""engine-loading: what tenants that are being served notice while adapters are brought to the GPU.

Llama-2-7B's shape, random bfloat16 weights, rank 16 on all linear layers. 31 tenants' requests decode, each with an
adapter of its own, which is resident. Meanwhile other adapters come in by `load_adapter`, each in the place of another:
from pinned host memory, some a second and one straight after the other, and from the disk, whose pages the system
forgets before. The phases take turns; a phase without loads is among them.

Two numbers: a load is one copy of 80 MB, 1.5 ms of the bus; and copies without a pause, at 55 GB/s, take 1.8 % of the
device memory's 3.0 TB/s away from the step.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorakit.adapters.bank import AdapterBank
from lorakit.bench.harness import show, statistics_of
from lorakit.bench.llamas import Llama, prompts, with_liger
from lorakit.bench.plots import bars
from lorakit.bench.random_bank import RandomBank
from lorakit.bench.served import allow_compiling, engine_config, has_gpu, quantiles, save_each, serve_rows
from lorakit.engine.engine import Engine
from lorakit.runtime.arena import aligned
from lorakit.runtime.model import MultiLoraModel

ALONE = "no loads"


class Phase(NamedTuple):
    """How adapters come in meanwhile.

    Attributes:
        disk: from the disk, or else from host memory.
        per_second: loads that begin each second at most; None: one straight after the other; 0: none.
    """

    disk: bool = False
    per_second: float | None = None


PHASES: Mapping[str, Phase] = {
    ALONE: Phase(per_second=0),
    "from host memory, 20 a second": Phase(per_second=20),
    "from host memory, without a pause": Phase(),
    "from the disk, without a pause": Phase(disk=True),
}


class Setting(NamedTuple):
    """What is measured.

    Attributes:
        rows: tenants that are being served.
        prompt: tokens of each.
        tokens: that each generates in a phase.
        coming: adapters that come in, in turn.
        room: of them, those that find room beside the tenants'.
        rounds: of all phases.
        liger: with liger-kernel's kernels, if it is installed.
    """

    rows: int = 31
    prompt: int = 128
    tokens: int = 256
    coming: int = 8
    room: int = 4
    rounds: int = 3
    liger: bool = True


def run(folder: Path) -> None:
    """Measures, prints and saves `engine_loading.json`; says so and does nothing where there is no GPU."""
    if has_gpu("engine-loading"):
        run_setting(folder, Llama(), Setting(), torch.device("cuda"))


def run_setting(
    folder: Path, llama: Llama, setting: Setting, device: torch.device, *, seconds: float | None = None
) -> None:
    """Measures, prints and saves one setting; no round begins after so many seconds."""
    states = measure(llama, setting, device)
    path, results = save_each(
        "engine_loading", folder, {**llama.as_json(), **setting._asdict()}, states, seconds=seconds
    )
    plot(results, path.with_suffix(".png"))
    rows = [
        [
            name,
            f"{found['between_tokens_ms']['p50']['median']:.2f}",
            f"{found['between_tokens_ms']['p99']['median']:.2f}",
            f"{found['p50_of_no_loads']['median']:.3f}",
            f"{found['p99_of_no_loads']['median']:.3f}",
            f"{found['loads_per_s']['median']:.1f}",
        ]
        for name, found in results.items()
    ]
    columns = ["adapters come in", "p50 ms", "p99 ms", "p50 ratio", "p99 ratio", "loads/s"]
    show(f"Between two tokens of {setting.rows} tenants: medians of rounds", columns, rows, path)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Two bars for each phase."""
    medians = {
        f"{name}, {at}": found["between_tokens_ms"][at]["median"]
        for name, found in results.items()
        for at in ("p50", "p99")
    }
    labels = [f"{median:.2f} ms" for median in medians.values()]
    bars(path, medians, "between two tokens, ms (median of rounds)", labels=labels, theirs=ALONE)


def measure(llama: Llama, setting: Setting, device: torch.device) -> Iterator[dict[str, Any]]:
    """Takes the phases in turn, round by round.

    Yields:
        Phase → statistics over the rounds until now; ratios are to the same round without loads.
    """
    allow_compiling()
    base = llama.build(device)
    if setting.liger:
        with_liger(base, "engine-loading")
    adapters = setting.rows + setting.coming
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
        bank = RandomBank(base, adapters, rank=llama.rank, dtype=llama.dtype, contents=adapters).on_disk(
            Path(place) / "bank"
        )
        each = max(aligned(entry.nbytes) for entry in bank.values())
        model = MultiLoraModel(base, bank, adapter_memory=(setting.rows + setting.room) * each)
        model.pool.host.limit = 2 * adapters * each  # pinned bytes count to a power of two
        names = bank.names
        tenants, coming = names[: setting.rows], names[setting.rows :]
        cache = llama.cache_bytes(setting.rows, setting.prompt + setting.tokens)
        with Engine(model, engine_config(setting.rows, cache, device)) as engine:
            asked = prompts(setting.rows, setting.prompt, llama.vocabulary)
            serve_rows(engine, asked, tenants, 8)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in PHASES}
            for _ in range(setting.rounds):
                for name, phase in PHASES.items():
                    _into_host_memory(model, coming)
                    found[name].append(_phase(engine, asked, tenants, coming, setting.tokens, phase))
                yield {name: _together(ones, found[ALONE]) for name, ones in found.items()}


def _phase(
    engine: Engine,
    asked: Sequence[Sequence[int]],
    tenants: Sequence[str],
    coming: Sequence[str],
    tokens: int,
    phase: Phase,
) -> dict[str, float]:
    """Milliseconds between tokens while all rows decode and adapters come in, and how many come a second."""
    handles = [
        engine.submit(prompt, name, max_new_tokens=tokens, ignore_eos=True)
        for prompt, name in zip(asked, tenants, strict=True)
    ]
    for handle in handles:
        next(iter(handle))
    loader = _Loader(engine.model, coming, phase)
    began = time.monotonic()
    loader.start()
    try:
        handles[0].wait()
        ended = time.monotonic()
    finally:
        loader.stop()
    between = []
    for handle in handles:
        times = [handle.submitted + at for at in handle.result().times]
        inside = [at for at in times if began <= at <= ended]
        assert len(inside) > 1, "all rows decode at the same time"
        between += [1e3 * (later - before) for before, later in itertools.pairwise(inside)]
    return {**quantiles(between), "loads_per_s": loader.loads / (ended - began)}


def _into_host_memory(model: MultiLoraModel, names: Sequence[str]) -> None:
    with model.lock:
        host = model.pool.host
        for adapter in map(model.adapter, names):
            if host.get(adapter.key) is None:
                host.put(adapter.key, adapter.source)


class _Loader(threading.Thread):
    """Brings adapters to the device until it is stopped, and counts them."""

    def __init__(self, model: MultiLoraModel, names: Sequence[str], phase: Phase) -> None:
        super().__init__(name="lorakit-bench-load", daemon=True)
        self.loads = 0
        self._model, self._names, self._phase = model, names, phase
        self._stopped = threading.Event()
        self._error: BaseException | None = None

    def stop(self) -> None:
        """Ends it; its error, if it had one, is raised."""
        self._stopped.set()
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            self._load()
        except BaseException as error:  # noqa: BLE001 - raised where it is stopped
            self._error = error

    def _load(self) -> None:
        rate = self._phase.per_second
        if rate == 0:
            return
        began = time.monotonic()
        for number, name in enumerate(itertools.cycle(self._names)):
            wait = 0.0 if rate is None else began + number / rate - time.monotonic()
            if self._stopped.wait(wait) if wait > 0 else self._stopped.is_set():
                return
            if self._phase.disk:
                self._forget(name)
            self._model.load_adapter(name)
            if not self._arrived(name):
                return
            self.loads += 1

    def _arrived(self, name: str) -> bool:
        """Waits for the copy's end; whether it was not stopped before."""
        with self._model.lock:
            slot = self._model.pool.get(self._model.adapter(name).key)
        assert slot is not None, "it is there until others have come"
        while True:
            with self._model.lock:
                if slot.ready():
                    return True
            if self._stopped.wait(1e-4):
                return False

    def _forget(self, name: str) -> None:
        """Neither host memory nor the system's page cache has the adapter any more."""
        bank = self._model.bank
        assert isinstance(bank, AdapterBank)
        entry = bank[name]
        with self._model.lock:
            self._model.pool.host.drop(entry.blake3)
        with open(bank.path / entry.shard, "rb", buffering=0) as shard:
            os.posix_fadvise(shard.fileno(), entry.offset, entry.nbytes, os.POSIX_FADV_DONTNEED)


def _together(found: Sequence[dict[str, float]], alone: Sequence[dict[str, float]]) -> dict[str, Any]:
    between = {at: statistics_of([one[at] for one in found]) for at in ("p50", "p99")}
    ratios = {
        f"{at}_of_no_loads": statistics_of([one[at] / quiet[at] for one, quiet in zip(found, alone, strict=True)])
        for at in ("p50", "p99")
    }
    return {
        "between_tokens_ms": between,
        **ratios,
        "loads_per_s": statistics_of([one["loads_per_s"] for one in found]),
    }
