"""What holds for every test: no network, one torch thread a worker, fixed seeds, torch's global state left alone."""

import os
import sys

# Read when torch and transformers are imported, so set before either is.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
for _variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import hypothesis
import numpy
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels then run on the CPU, slowly. Read when Triton is imported, whichever test does so first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A first call into torch takes seconds on a busy machine, so no deadline; in CI the same examples every time.
hypothesis.settings.register_profile("lorakit", deadline=None, print_blob=True, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("lorakit")


def pytest_collection_modifyitems(items):
    # Nobody shall wait for them in the end, with one core busy.
    items.sort(key=lambda item: "early" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    """Dynamo counts recompilations by code object, and all models of a process share transformers' code: without this
    the test that compiles the ninth model fails."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _torch_state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def _torch_state_is_left_alone():
    """Fails the test that changes it, not the unlucky one that runs next."""
    before = _torch_state()
    yield
    after = _torch_state()
    changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    if changed:
        torch.set_default_dtype(before["default dtype"])
        torch.set_default_device(before["default device"])
        torch.set_grad_enabled(before["grad mode"])
        torch.use_deterministic_algorithms(before["deterministic algorithms"])
        torch.set_float32_matmul_precision(before["float32 matmul precision"])
        torch.set_num_threads(before["threads"])
        pytest.fail(f"the test left torch's global state changed (before, after): {changed}")
