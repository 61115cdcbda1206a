"""The compatibility tables of the documentation, made from what the tests measured.

    LORAKIT_COMPATIBILITY=build/compatibility pytest tests/adapters tests/runtime/test_fidelity.py
    python tests/compatibility.py build/compatibility docs/guides/compatibility.md

or `make compatibility`. Tests call `served`, `approximated` and `refused`; each writes a line of JSON, if the
environment names a folder for it. Nothing in the tables is written by hand.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.places import place_of

FOLDER = "LORAKIT_COMPATIBILITY"
PLACES = ("Linear", "Conv1D", "Embedding", "Norm", "output")


def served(method: str, architecture: str, places: set[str], error: float, way: str = "exact") -> None:
    """Notes that a method was served exactly, or by SVD without loss.

    Args:
        method: its name in the table.
        architecture: the tiny model's name.
        places: of `PLACES`, where the adapter sat.
        error: of the logits, relative to PEFT's.
        way: "exact" or "SVD".
    """
    _write({"method": method, "architecture": architecture, "places": sorted(places), "error": error, "way": way})


def approximated(method: str, energy: float, rank: int, least: int, lost: float) -> None:
    """Notes what a share of its energy costs a method that is converted by SVD.

    Args:
        method: its name in the table.
        energy: the share that was kept.
        rank: the largest rank that this took.
        least: the smaller side of the module of that rank.
        lost: the largest error of a module's change.
    """
    _write({"method": method, "energy": energy, "rank": rank, "least": least, "lost": lost})


def refused(method: str, reason: str) -> None:
    """Notes that a PEFT type was refused, and what the user was told."""
    _write({"method": method, "reason": reason})


def places_of(base: nn.Module, paths: list[str]) -> set[str]:
    """What kinds of places these modules are."""
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    found = set()
    for path in paths:
        module = base.get_submodule(path)
        place = place_of(module)
        assert place is not None, f"{path} was served"
        kind = "Conv1D" if isinstance(module, Conv1D) else place.kind.title()
        found.add("output" if module is output else kind)
    return found


def _write(line: dict[str, Any]) -> None:
    if folder := os.environ.get(FOLDER):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def page(lines: list[dict[str, Any]]) -> str:
    """The documentation's page."""
    errors: dict[str, dict[str, float]] = defaultdict(dict)
    places: dict[str, set[str]] = defaultdict(set)
    ways = {}
    cut = {}
    reasons = {}
    for line in lines:
        method = line["method"]
        if "reason" in line:
            reasons[method] = line["reason"]
            continue
        if "energy" in line:
            cut[method] = [f"{line['energy']:g}", f"{line['rank']} of {line['least']}", f"{line['lost']:.2f}"]
            continue
        of_method = errors[method]
        of_method[line["architecture"]] = max(of_method.get(line["architecture"], 0.0), line["error"])
        places[method] |= set(line["places"])
        ways[method] = line.get("way", "exact")
    architectures = sorted({name for of_method in errors.values() for name in of_method})
    by_place = [
        [method, *(ways[method] if place in places[method] else "–" for place in PLACES)] for method in sorted(errors)
    ]
    by_architecture = [
        [method, *(f"{errors[method][name]:.0e}" if name in errors[method] else "–" for name in architectures)]
        for method in sorted(errors)
    ]
    left = [[method, reason] for method, reason in sorted(reasons.items()) if method not in errors]
    return f"""# Compatibility

Which PEFT methods lorakit converts exactly, which by SVD, where their adapters may sit, and what the tests measured.
This page is made by the test run (`make compatibility`), not by hand. "–" means not tested there, not that it fails.

## Methods and places

{_table(["method", *PLACES], by_place)}

"SVD" means that the method has no exact low-rank form: it is refused, unless an export is given `svd_energy`.
"output" is `lm_head` and the like, tied to the embedding or not.

## Methods and architectures

The largest error of the logits, relative to PEFT's, each adapter with every parameter random, tiny random models in
fp32. A row of the base lies beside it in the same batch and is compared too. What goes by SVD is measured with
`svd_energy=1`, which loses nothing.

{_table(["method", *architectures], by_architecture)}

## By SVD

What a smaller share of the energy costs: the largest rank that it takes, of as many as the module has, and the largest
relative error ‖ΔW − B A‖ / ‖ΔW‖ of a module's change, on the tiny Llama. Random parameters have little to cut off; what
an adapter of your own loses, its export says.

{_table(["method", "svd_energy", "rank", "error"], [[method, *cut[method]] for method in sorted(cut)])}

## Refused

{_table(["PEFT type", "what the user is told"], left)}
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{folder} holds no measurements: run the tests with {FOLDER}={folder} first.")
    out.write_text(page(lines), encoding="utf-8")
    print(f"wrote {out}: {len(lines)} measurements")


if __name__ == "__main__":
    main()
