"""Costs from saved measurements: what is fitted, and what is assumed.

    python -m lorakit.scheduler.fitting benchmarks lorakit/scheduler/measured

makes the files of `measured/` again. For Llama-2-7B on an H100:

- `step`, `row`, `context`, `lora` and `rank` by least squares to seven decode steps whose batch is known: five of
  engine-step (32 rows and one, without adapters, with one, with 32) and the median ones of engine-workloads with 64
  rows (one adapter, and one a row), whose contexts are longer. Five numbers from seven: what they are worth is shown by
  whole runs (`docs/guides/simulate.md`).
- `prompt` from kernels-prefill-layer, base and adapters of rank 16: so many layers of it, over its tokens.
- `prompts` from engine-workloads: what a forward with a prompt takes longer than one without is there the difference of
  p99 and p50 between tokens, as some percent of the gaps have a prompt in them; less the median prompt's own tokens. It
  is a copy of all that the rows have in the cache: 32 rows take half as long as the 64 that were measured.
- `load` from adapter-load.

Assumed: the start of a GPU, 30 s. For other bases on an H100: Llama-2-7B's `row`, `prompt` and `load`, scaled by their
weights, `prompts` by their layers and `context` by the bytes of keys and values. For an H200, whose steps were not
measured alone: all of an H100's, times one factor that makes the median time between tokens right where all requests
share an adapter; `rank` and `prompts` from its own runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorakit.scheduler.costs import SECOND

_MS = SECOND // 1000
_RANK, _ROWS, _MANY = 16, 32, 64
_PUNICA_MEDIAN_PROMPT = 17
_H100 = "NVIDIA H100 80GB HBM3"


def fit(benchmarks: Path) -> dict[str, dict[str, Any]]:
    """All fits.

    Args:
        benchmarks: the folder of saved results.

    Returns:
        Name → the content of its file.
    """
    step = _read(benchmarks, "engine_step")
    base = _base_7b(benchmarks, step)
    from_7b = {"engine_step.json", "kernels_prefill_layer.json", "engine_workloads.json"}
    found = {"h100-llama-2-7b": _content(base, sorted(from_7b | {"adapter_load.json"}), _H100)}
    for name, file in (("llama-3-8b", "engine_step_8b"), ("llama-2-13b", "engine_step_13b")):
        other = _read(benchmarks, file)
        costs = _scaled(base, step["setting"], other)
        found[f"h100-{name}"] = _content(costs, [f"{file}.json", "and those of h100-llama-2-7b"], _H100)
    found["h200-llama-2-7b"] = _content(
        _h200(base, _cells(benchmarks, _ROWS, "NVIDIA H200")),
        ["engine_workloads.json", "and those of h100-llama-2-7b"],
        "NVIDIA H200",
    )
    return found


class Timed(NamedTuple):
    """A forward that was measured. See `Costs.forward`.

    Attributes:
        rows: that were decoded.
        context: tokens of theirs.
        ranks: of the batch's adapters, each adapter once; 0: no row has one.
        prompt: tokens of prompts that began.
        ms: what it took.
    """

    rows: int
    context: float
    ranks: int
    prompt: int
    ms: float


def fit_forwards(forwards: Iterable[Timed]) -> dict[str, float]:
    """The costs that a forward consists of, in milliseconds, from forwards that were measured on purpose.

    None is below 0: what least squares makes so is left out, the lowest first, and the others are fitted anew.
    """
    found = list(forwards)
    names = ["step", "row", "context", "lora", "rank", "prompts", "prompt"]
    matrix = np.array(
        [[1, one.rows, one.context, one.ranks > 0, one.ranks, one.prompt > 0, one.prompt] for one in found], dtype=float
    )
    times = np.array([one.ms for one in found])
    used = [place for place in range(len(names)) if matrix[:, place].any()]
    while True:
        solution = _least_squares(matrix[:, used], times)
        if solution.min() >= 0:
            break
        del used[int((solution * matrix[:, used].max(axis=0)).argmin())]
    return dict.fromkeys(names, 0.0) | {names[place]: float(value) for place, value in zip(used, solution, strict=True)}


def _least_squares(matrix: Any, times: Any) -> Any:
    """As numpy's, its columns scaled to one size."""
    scale = np.abs(matrix).max(axis=0)
    return np.linalg.lstsq(matrix / scale, times, rcond=None)[0] / scale


def _base_7b(benchmarks: Path, step: Mapping[str, Any]) -> dict[str, float]:
    setting = step["setting"]
    context = setting["prompt"] + (setting["short"] + setting["long"]) / 2
    mixes = {"no adapters": (0, (32, 1)), "one adapter": (1, (32, 1)), "distinct adapters": (32, (32,))}
    rows, times = [], []
    for mix, (adapters, batches) in mixes.items():
        for batch in batches:
            rows.append([1, batch, batch * context, adapters > 0, _RANK * adapters])
            times.append(step["results"][f"lorakit, {mix}, batch {batch}, liger"]["step_ms"]["median"])
    cells = _cells(benchmarks, _MANY, _H100)
    for cell in cells.values():
        rows.append([1, _MANY, _MANY * MEAN_CONTEXT, 1, _RANK * cell["mean_adapters_of_a_forward"]])
        times.append(cell["between_tokens_ms"]["p50"])
    solution = _least_squares(np.array(rows, dtype=float), np.array(times))
    layer = _read(benchmarks, "kernels_prefill_layer")
    tokens = layer["setting"]["rows"] * layer["setting"]["tokens_per_row"]
    timed = layer["results"][f"rank {_RANK}"]
    layers = setting["shape"]["num_hidden_layers"]
    prompt = layers * (timed["base_us"]["median"] + timed["added_us"]["lorakit"]["median"]) / tokens / 1e3
    return {
        **dict(zip(("step", "row", "context", "lora", "rank"), solution.tolist(), strict=True)),
        "prompts": (_longer(cells) - _PUNICA_MEDIAN_PROMPT * prompt) * _ROWS / _MANY,
        "prompt": prompt,
        "load": _read(benchmarks, "adapter_load")["results"]["load_ms"]["median"],
    }


def _scaled(base: Mapping[str, float], setting: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """The costs of another base on the same GPU, from its own three decode steps of 32 rows."""
    mine, theirs = setting["shape"], other["setting"]["shape"]
    weights, cache = _weights(theirs) / _weights(mine), _cache(theirs) / _cache(mine)
    none, one, all_of_them = (
        other["results"][f"lorakit, {mix}, batch {_ROWS}, liger"]["step_ms"]["median"]
        for mix in ("no adapters", "one adapter", "distinct adapters")
    )
    middle = other["setting"]["prompt"] + (other["setting"]["short"] + other["setting"]["long"]) / 2
    row, context = base["row"] * weights, base["context"] * cache
    rank = (all_of_them - one) / (_ROWS - 1) / _RANK
    return {
        "step": none - _ROWS * row - _ROWS * middle * context,
        "row": row,
        "context": context,
        "lora": one - none - _RANK * rank,
        "rank": rank,
        "prompts": base["prompts"] * theirs["num_hidden_layers"] / mine["num_hidden_layers"],
        "prompt": base["prompt"] * weights,
        "load": base["load"] * weights,
    }


def _h200(base: Mapping[str, float], found: Mapping[str, Any]) -> dict[str, float]:
    """One factor, by which an H200's steps of one adapter are shorter, and what an adapter more costs there."""
    p50 = {name: one["between_tokens_ms"]["p50"] for name, one in found.items()}
    adapters = {name: one["mean_adapters_of_a_forward"] for name, one in found.items()}
    one = base["step"] + _ROWS * (base["row"] + MEAN_CONTEXT * base["context"]) + base["lora"] + _RANK * base["rank"]
    factor = p50["identical"] / one
    rank = (p50["distinct"] - p50["identical"]) / (adapters["distinct"] - adapters["identical"]) / _RANK
    scaled = {name: value * factor for name, value in base.items()}
    # An adapter's own cost is known there, so what one costs less of it is in `lora`.
    scaled["lora"] += _RANK * (scaled["rank"] - rank)
    prompts = _longer(found) - _PUNICA_MEDIAN_PROMPT * scaled["prompt"]
    return {**scaled, "rank": rank, "prompts": prompts, "load": base["load"]}


MEAN_CONTEXT = 681
"""Tokens of a running request's context with Punica's lengths: of U(0, 2048) in all, about a third of the most."""


def _cells(benchmarks: Path, rows: int, gpu: str) -> dict[str, Any]:
    """Popularity → what engine-workloads found at a batch size on a kind of GPU."""
    cells = _read(benchmarks, "engine_workloads")["cells"]
    ends = f"batch {rows}, liger, {gpu}"
    return {name.split(",")[0]: cell["results"] for name, cell in cells.items() if name.endswith(ends)}


def _longer(cells: Mapping[str, Any]) -> float:
    """By how many milliseconds forwards with a prompt are longer than others."""
    gaps = [cell["between_tokens_ms"] for cell in cells.values()]
    return float(np.mean([gap["p99"] - gap["p50"] for gap in gaps]))


def _weights(shape: Mapping[str, Any]) -> float:
    """Weights of the linear layers of a Llama, and of its head."""
    hidden, heads = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * heads) + 3 * hidden * shape["intermediate_size"]
    return float(layer * shape["num_hidden_layers"] + hidden * shape["vocab_size"])


def _cache(shape: Mapping[str, Any]) -> float:
    """Numbers of a token's keys and values."""
    heads = shape["num_key_value_heads"] / shape["num_attention_heads"]
    return float(2 * shape["hidden_size"] * heads * shape["num_hidden_layers"])


def _content(costs: Mapping[str, float], files: list[str], gpu: str) -> dict[str, Any]:
    return {
        "gpu": gpu,
        "from": files,
        "picoseconds": {name: round(value * _MS) for name, value in costs.items()},
    }


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main(benchmarks: str, out: str) -> None:
    """Writes all fits."""
    for name, content in fit(Path(benchmarks)).items():
        Path(out, f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
