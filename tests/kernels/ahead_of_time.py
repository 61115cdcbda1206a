"""Compiles the kernels for GPUs that need not be there, and reads from the binaries what each program takes.

    python tests/kernels/ahead_of_time.py --capability 90             # what the tests compile
    python tests/kernels/ahead_of_time.py --capability 90 --all       # every mix of dtypes, siblings and ranks

A program of its own, and not part of the tests' process: there the kernels may be interpreted, and what Triton has
once defined for its interpreter it cannot compile. Nothing of the launches is repeated here. The launchers are called
with tensors that have shapes and no memory; where they would launch, Triton compiles for the GPU asked for, with the
specialisations that it would infer for a real launch.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lorakit_kernels import arguments, decode, dense, embedding, entries, paged, prefill, sampling, tuning, whole
from lorakit_kernels.plan import COLUMNS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The GPUs of each compute capability: names that a data file may carry, and the shared memory a program may take.
GPUS = {80: ("A100",), 90: ("H100", "H200", "GH200"), 100: ("B200", "GB200")}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 255

# Shapes of an 8B model's attention, and one where nothing is a multiple of 16, which Triton compiles differently.
ALIGNED = (4096, (4096, 1024, 1024, 4096))
ODD = (777, (265, 130, 1001, 777))


@dataclass(frozen=True)
class Case:
    """One launch: dtypes of x and of the weights, siblings, the most ranks, and the module's sizes."""

    x: torch.dtype
    weight: torch.dtype
    siblings: int
    max_rank: int
    sizes: tuple = ALIGNED

    def __str__(self):
        x, weight = (str(dtype).removeprefix("torch.") for dtype in (self.x, self.weight))
        return f"x {x}, weights {weight}, {self.siblings} siblings, rank {self.max_rank}, in {self.sizes[0]}"


# Each dtype of the weights, one sibling and several, one tile of ranks and several, each pair of these at least once.
FEW = (
    Case(BF16, BF16, 1, 16),
    Case(BF16, BF16, 3, 128),
    Case(BF16, FP16, 3, 16),
    Case(BF16, FP32, 1, 128),
    Case(BF16, FP32, 3, 16),
    Case(FP32, FP32, 3, 128),
    Case(FP16, FP16, 1, 128),
    Case(BF16, BF16, 3, 16, ODD),
)
ALL = tuple(
    Case(*dtypes, siblings, max_rank, sizes)
    for dtypes, siblings, max_rank, sizes in itertools.product(
        ((BF16, BF16), (BF16, FP16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32), (FP32, BF16)),
        (1, 2, 3, 4),
        (16, 64, 128, 512),
        (ALIGNED, ODD),
    )
)


def tensor(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(case, rows, tokens, parts):
    """x, the siblings' y, h, table, plan and columns of a launch."""
    in_features, outs = case.sizes
    return (
        tensor(tokens, in_features, dtype=case.x),
        [tensor(tokens, out, dtype=case.x) for out in outs[: case.siblings]],
        tensor(case.siblings, tokens, parts, case.max_rank, dtype=FP32),
        tensor(9, 7, entries.WORDS, dtype=torch.int64),
        tensor(rows, COLUMNS, dtype=torch.int32),
        list(range(2, 2 + case.siblings)),
    )


def decode_shrink(case, tiles):
    x, _, h, table, rows, columns = operands(case, 8, 8, decode.splits(case.sizes[0], tiles.decode.of(case.weight)))
    decode.shrink(x, h, table, rows, columns, case.weight, tiles.decode.of(case.weight))


def decode_expand(case, tiles):
    _, ys, h, table, rows, columns = operands(case, 8, 8, decode.splits(case.sizes[0], tiles.decode.of(case.weight)))
    decode.expand(ys, h, table, rows, columns, case.weight, tiles.decode.of(case.weight))


def prefill_shrink(case, tiles):
    x, _, h, table, rows, columns = operands(case, 8, 8192, prefill.splits(case.sizes[0], tiles.prefill))
    prefill.shrink(x, h, table, rows, columns, case.weight, tiles.for_prefill(x, case.weight, case.max_rank))


def prefill_expand(case, tiles):
    _, ys, h, table, rows, columns = operands(case, 8, 8192, prefill.splits(case.sizes[0], tiles.prefill))
    prefill.expand(ys, h, table, rows, columns, case.weight, tiles.for_prefill(ys[0], case.weight, case.max_rank))


def embedding_lookup(case, tiles):
    _, _, _, table, rows, columns = operands(case, 8, 8192, 1)
    ids = tensor(8192, dtype=torch.int64 if case.siblings > 1 else torch.int32)
    h = tensor(1, 8192, 1, case.max_rank, dtype=FP32)
    embedding.lookup(ids, h, table, rows, columns[0], case.weight)


def whole_linear(case, tiles):
    x, ys, _, table, rows, columns = operands(case, 8, 8 if case.siblings == 1 else 8192, 1)
    whole.linear(x, ys[0], table, rows, columns[0], case.weight)


def whole_embedding(case, tiles):
    _, ys, _, table, rows, columns = operands(case, 8, 8192, 1)
    ids = tensor(8192, dtype=torch.int64 if case.siblings > 1 else torch.int32)
    whole.embedding(ids, ys[0], table, rows, columns[0], case.weight)


def dense_products(case, tiles):
    if tiles.dense is None or case.x == FP32 or case.sizes[0] % tiles.dense.block_k:
        return
    for tokens in (1, 17, tiles.dense.tokens):
        x, ys, *_ = operands(case, 8, tokens, 1)
        weights = [tensor(y.shape[-1], x.shape[-1], dtype=case.x) for y in ys]
        biases = [tensor(y.shape[-1], dtype=case.x) for y in ys] if case.siblings > 1 else []
        dense.products(x, weights, biases, ys, tiles.dense)


def paged_attend(case, tiles):
    """Heads with a query each and with several, few rows and many."""
    if tiles.paged is None or case.x == FP32:
        return
    for rows, queries, heads, size in ((1, 32, 32, 128), (1, 16, 1, 128), (32, 32, 32, 128), (64, 32, 8, 64)):
        keys, values = tensor(9, 256, 2, heads, size, dtype=case.x).unbind(2)
        paged.attend_by(
            tiles.for_paged(rows * heads),
            tensor(rows, queries, size, dtype=case.x), *[tensor(rows, heads, size, dtype=case.x)] * 2, keys, values,
            tensor(rows, dtype=torch.int32), tensor(rows, 16, dtype=torch.int32),
            tensor(rows * heads, dtype=torch.int32), 0.1,
        )  # fmt: skip


def sampling_sample(case, tiles):
    """Vocabularies of one chunk and of several, that fill the last one and do not, with rows that are cut or not."""
    if case != FEW[0]:
        return
    for size, cuts in ((1, True), (101, True), (32000, True), (50257, True), (50257, False), (262144, True)):
        rows = [tensor(8, dtype=dtype) for dtype in (FP32, torch.int32, FP32, FP32, FP32)]
        sampling.sample(tensor(8, size, dtype=FP32), *rows, cuts=cuts)


KERNELS = {
    "decode.shrink": (decode, "shrink_kernel", decode_shrink),
    "decode.expand": (decode, "expand_kernel", decode_expand),
    "prefill.shrink": (prefill, "shrink_kernel", prefill_shrink),
    "prefill.expand": (prefill, "expand_kernel", prefill_expand),
    "embedding.lookup": (embedding, "lookup_kernel", embedding_lookup),
    "whole.linear": (whole, "linear_kernel", whole_linear),
    "dense.products": (dense, "products_kernel", dense_products),
    "paged.attend": (paged, "attend_kernel", paged_attend),
    "whole.embedding": (whole, "embedding_kernel", whole_embedding),
    "sampling.sample": (sampling, "tops_kernel floors_kernel weights_kernel choose_kernel", sampling_sample),
}
"""Each with its module, the kernels that are launched, and what launches them."""

MAY_BE_LEFT_OUT = ("dense.products", "paged.attend", "sampling.sample")
"""For some cases, or on some GPUs."""


class Target:
    """What Triton asks a GPU's driver for before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


class Compiled:
    """Stands in for a kernel: compiles what would be launched, and keeps it."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.binaries = []

    def __getitem__(self, grid):
        def compile_only(*args, **options):
            self.binaries.append(self.kernel.warmup(*args, grid=grid, **options))

        return compile_only


def usage(binary):
    """What cuobjdump says a kernel takes: {"REG": registers a thread, "STACK": bytes, "LOCAL": bytes}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def tile_files(capability):
    """The data files for a compute capability: the fallback, and those of its GPUs."""
    folder = tuning._FOLDER
    for path in sorted(folder.glob("*.json")):
        words = path.stem.split("_")
        if path.stem == tuning._FALLBACK or any(gpu in words for gpu in GPUS[capability]):
            yield path


def main():
    assert not triton.knobs.runtime.interpret, "interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, choices=GPUS, action="append")
    parser.add_argument("--kernel", choices=KERNELS, action="append")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    faults = 0
    for capability in options.capability or GPUS:
        driver.set_active(Target(capability))
        arguments.overlaps = lambda device, capability=capability: capability >= 90
        for module, attributes, _ in KERNELS.values():
            for attribute in attributes.split():
                # Triton keeps what it compiled by the device's number, and here all have the same.
                getattr(module, attribute).device_caches.clear()
        for path, name in itertools.product(tile_files(capability), options.kernel or KERNELS):
            module, attributes, call = KERNELS[name]
            originals = {attribute: getattr(module, attribute) for attribute in attributes.split()}
            for case in ALL if options.all else FEW:
                compiled = {attribute: Compiled(original) for attribute, original in originals.items()}
                vars(module).update(compiled)
                try:
                    call(case, tuning.read(path))
                finally:
                    vars(module).update(originals)
                binaries = [binary for one in compiled.values() for binary in one.binaries]
                assert binaries or name in MAY_BE_LEFT_OUT, "nothing was launched"
                for binary in binaries:
                    used = usage(binary)
                    used["SHARED"] = binary.metadata.shared
                    assert ("griddepcontrol" in binary.asm["ptx"]) == (capability >= 90)
                    bad = []
                    if used["STACK"] or used["LOCAL"]:
                        bad.append("spills")
                    if used["REG"] > REGISTERS:
                        bad.append("too many registers")
                    if used["SHARED"] > SHARED[capability]:
                        bad.append("too much shared memory")
                    faults += bool(bad)
                    told = " ".join(f"{key}:{value}" for key, value in used.items())
                    print(f"sm_{capability} {path.stem} {name}: {case}: {told} {', '.join(bad) or 'ok'}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
