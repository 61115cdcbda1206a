"""Kernel tests run where they can: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
import triton


@pytest.fixture(scope="session")
def device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert triton.knobs.runtime.interpret, "tests/conftest.py sets TRITON_INTERPRET"
    return torch.device("cpu")
