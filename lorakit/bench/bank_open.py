"""Opening a bank of 1,000 adapters: time, memory, and the bytes that are read.

An adapter names 224 modules, as rank-16 LoRA on all linears of a 7B Llama does; the matrices are small, so that the
bank fits everywhere: opening reads the index, whose size does not depend on theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit.adapters.bank import AdapterBank
from lorakit.adapters.folder import INDEX_NAME
from lorakit.adapters.form import AdapterForm, ModuleForm
from lorakit.adapters.sizes import human_bytes
from lorakit.bench.harness import save, show, statistics_of
from lorakit.console import bar

ADAPTERS, LAYERS, RANK, WIDTH, REPEATS = 1000, 32, 16, 64, 7
_MODULES = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)

# In a fresh process, imports done: what a server's start pays for the bank itself.
_CHILD = """
import json, sys, time
import psutil
from lorakit.adapters.bank import AdapterBank
process = psutil.Process()
memory, read = process.memory_info().rss, process.io_counters().read_chars
started = time.perf_counter()
bank = AdapterBank.open(sys.argv[1])
seconds = time.perf_counter() - started
grown, bytes_read = process.memory_info().rss - memory, process.io_counters().read_chars - read
started = time.perf_counter()
bank.read(bank.names[len(bank) // 2])
print(json.dumps([len(bank), seconds, grown, bytes_read, time.perf_counter() - started]))
"""


def run(folder: Path) -> None:
    """Measures, prints and saves `bank_open.json`."""
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as place:
        path = Path(place) / "bank"
        bank = AdapterBank.create(path, base_id="bench", fingerprint={})
        with bar("pack", ADAPTERS) as step:
            bank.add_forms(_forms(), progress=step)
        with bar("open", REPEATS) as step:
            runs = []
            for _ in range(REPEATS):
                runs.append(_open(path))
                step()
        index = (path / INDEX_NAME).stat().st_size
        shards = bank.info().nbytes
    assert {count for count, *_ in runs} == {ADAPTERS}
    quantities = {
        "open_ms": statistics_of([seconds * 1e3 for _, seconds, *_ in runs]),
        "memory_growth_bytes": statistics_of([grown for _, _, grown, *_ in runs]),
        "bytes_read": statistics_of([read for *_, read, _ in runs]),
        "read_one_adapter_ms": statistics_of([seconds * 1e3 for *_, seconds in runs]),
    }
    setting = {"adapters": ADAPTERS, "modules": LAYERS * len(_MODULES), "rank": RANK, "in_and_out_features": WIDTH}
    saved = save("bank_open", folder, setting, {"index_bytes": index, "shard_bytes": shards, **quantities})
    rows = [[name, *(f"{values[key]:,.1f}" for key in ("min", "median", "max"))] for name, values in quantities.items()]
    title = f"A bank of {ADAPTERS:,} adapters: index {human_bytes(index)}, shards {human_bytes(shards)}"
    show(title, ["opening", "min", "median", "max"], rows, saved)


def _forms() -> Iterator[tuple[str, AdapterForm, str]]:
    paths = [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in _MODULES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(_MODULES)}
    generator = torch.Generator().manual_seed(0)
    for number in range(ADAPTERS):
        a, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((RANK, WIDTH), (WIDTH, RANK)))
        module = ModuleForm("linear", WIDTH, WIDTH, a, b, 2.0)
        form = AdapterForm("lora", dict.fromkeys(paths, module), config)
        yield f"tenant-{number:04d}", form, f"org/tenant-{number:04d}"


def _open(path: Path) -> tuple[int, float, int, int, float]:
    """Adapters, seconds to open, memory growth and bytes read by it, seconds to read one adapter."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True)
    count, seconds, grown, read, one = json.loads(done.stdout)
    return count, seconds, grown, read, one
