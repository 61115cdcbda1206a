"""The benchmarks of the kernels, on the GPU at hand: saves benchmarks/kernels_<name>.json and a plot beside it.

    python kernels/benchmarks                   # all
    python kernels/benchmarks decode_layer      # some, by name

`lorakit` and `lorakit_kernels` must be importable.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path

from timing import need_gpu

NAMES = ("decode_layer", "one_operator", "mixed_ranks", "prefill_layer", "base_products", "paged_attention", "sampling")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python kernels/benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all without one")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "benchmarks")
    options = parser.parse_args()
    for name in options.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
    need_gpu()
    # Wide enough for the tables where no terminal says how wide it is.
    os.environ.setdefault("COLUMNS", "120")
    import torch

    for name in options.names or NAMES:
        started = time.perf_counter()
        torch.manual_seed(0)
        importlib.import_module(name).run(options.out)
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - started:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
