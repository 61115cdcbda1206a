"""The choice of backend."""

import subprocess
import sys

import torch

from lorakit.runtime import ops

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "tests")
import torch
from architectures import ARCHITECTURES, adapt
from lorakit import MultiLoraModel
from lorakit.runtime import ops
base = ARCHITECTURES["llama"].build()
model = MultiLoraModel(base)
model.load_adapter("tenant", adapt(base, 0, target_modules="all-linear"))
with torch.no_grad():
    model(**ARCHITECTURES["llama"].inputs(2), adapter_ids=["tenant", None])
assert not ops.HAS_TRITON and not ops.has_kernels(torch.device("cuda"), torch.bfloat16)
"""


def test_all_works_where_triton_is_not_installed():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_are_for_cuda_and_three_dtypes():
    assert not ops.has_kernels(torch.device("cpu"), torch.float32)
    assert not ops.has_kernels(torch.device("cuda"), torch.float64)
    assert not ops.has_kernels(torch.device("meta"), torch.bfloat16)
