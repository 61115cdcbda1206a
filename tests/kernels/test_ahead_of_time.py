"""The kernels compile for every generation of GPU, with its tile sizes, without spilling registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "ahead_of_time.py"
KERNELS = [
    ("decode.shrink", "decode.expand"),
    ("prefill.shrink",),
    # Lookups and samplers are compiled in an instant, and have no tiles.
    ("prefill.expand", "embedding.lookup", "whole.embedding", "sampling.sample"),
    ("whole.linear", "dense.products"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS, ids=" ".join)
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_fit_the_gpu(capability, kernels):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, "--capability", capability, *(f"--kernel={name}" for name in kernels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if not line.endswith(" ok")]
    assert done.returncode == 0, done.stderr
    assert lines
