"""Benchmarks of lorakit on the machine at hand. Each measures its rivals in the same run and saves what it saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from lorakit.bench import (
    adapter_load,
    bank_open,
    cluster,
    cpu_decode,
    cpu_engine,
    engine_adapters,
    engine_loading,
    engine_peft,
    engine_step,
    engine_tensor_parallel,
    engine_workloads,
    export,
    scheduler_hour,
    simulator,
)

BENCHMARKS: Mapping[str, Callable[[Path], None]] = {
    "cpu-decode": cpu_decode.run,
    "cpu-engine": cpu_engine.run,
    "bank-open": bank_open.run,
    "adapter-load": adapter_load.run,
    "engine-step": engine_step.run,
    "engine-step-8b": engine_step.run_8b,
    "engine-step-13b": engine_step.run_13b,
    "engine-workloads": engine_workloads.run,
    "engine-adapters": engine_adapters.run,
    "engine-loading": engine_loading.run,
    "engine-peft": engine_peft.run,
    "engine-tensor-parallel": engine_tensor_parallel.run,
    "export": export.run,
    "simulator": simulator.run,
    "scheduler-hour": scheduler_hour.run,
    "cluster": cluster.run,
}
