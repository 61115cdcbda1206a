"""The base's own products of siblings in decoding: in one launch, and apart as cuBLAS has them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plots
import torch
from rivals import FAILURES
from shapes import DTYPE, LAYER, Shape
from timing import REPEATS, WARM, alone, median
from torch import Tensor
from torch.nn.functional import linear

from lorakit.bench.harness import save, show, statistics_of
from lorakit_kernels import dense
from lorakit_kernels.tuning import Dense, tiles

TOKENS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = tuple(shape for shape in LAYER if len(shape.outs) > 1)
LAYERS, FEW_REPEATS = 16, 11
BANDWIDTH = 3.0e6  # Bytes a microsecond.

Products = Callable[[Tensor, Sequence[Tensor]], None]


def run(folder: Path) -> None:
    tile = tiles(torch.device("cuda")).dense
    if tile is None:
        print("base_products: this GPU has no tiles for them")
        return
    results: dict[str, Any] = {}
    for shape in SHAPES:
        size = sum(shape.outs) * shape.in_features * DTYPE.itemsize
        for tokens in TOKENS:
            us = {
                name: statistics_of(_times(shape, tokens, how))
                for name, how in (("joined", functools.partial(_joined, tile)), ("apart", _apart))
            }
            results[f"{shape.name}, {tokens}"] = {"us": us, "floor_us": size / BANDWIDTH}
    setting = {
        "shapes": [[shape.name, shape.in_features, shape.outs] for shape in SHAPES],
        "dtype": "bfloat16",
        "tokens": TOKENS,
        "repeats": REPEATS,
        "warm": WARM,
    }
    path = save("kernels_base_products", folder, setting, results)
    columns = ["siblings, tokens", "min us", "median us", "max us", "cuBLAS, median us", "bytes at 3.0 TB/s, us"]
    rows = [
        [name, *plots.three(r["us"]["joined"]), f"{r['us']['apart']['median']:.2f}", f"{r['floor_us']:.2f}"]
        for name, r in results.items()
    ]
    show("The base's products of siblings", columns, rows, path)


def joined(tokens: int, tile: Dense) -> float:
    """Microseconds of all siblings of a layer, in one launch each; the median."""
    return sum(median(_times(shape, tokens, functools.partial(_joined, tile), FEW_REPEATS)) for shape in SHAPES)


def apart(tokens: int) -> float:
    """The same, each product alone."""
    return sum(median(_times(shape, tokens, _apart, FEW_REPEATS)) for shape in SHAPES)


def compile_joined(tile: Dense) -> None:
    """Compiles what a tile needs; what cannot be is left out where it is timed."""
    for shape in SHAPES:
        for tokens in TOKENS:
            with contextlib.suppress(*FAILURES):
                _joined(tile, _x(shape, tokens), _weights(shape, 1)[0])
                torch.cuda.synchronize()


def _joined(tile: Dense, x: Tensor, weights: Sequence[Tensor]) -> None:
    dense.products(x, weights, (), [x.new_empty((len(x), len(weight))) for weight in weights], tile)


def _apart(x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        linear(x, weight)


def _times(shape: Shape, tokens: int, how: Products, repeats: int = REPEATS) -> list[float]:
    x, layers = _x(shape, tokens), _weights(shape, LAYERS)

    def work() -> None:
        for weights in layers:
            how(x, weights)

    return alone(work, LAYERS, repeats)


def _x(shape: Shape, tokens: int) -> Tensor:
    return torch.randn(tokens, shape.in_features, device="cuda", dtype=DTYPE)


@functools.cache
def _weights(shape: Shape, layers: int) -> list[list[Tensor]]:
    """Other weights in each layer: together more than the second-level cache holds."""
    small = shape.in_features**-0.5
    return [
        [torch.randn(out, shape.in_features, device="cuda", dtype=DTYPE).mul_(small) for out in shape.outs]
        for _ in range(layers)
    ]
