"""What many tests of the engine begin with."""

import pytest
from served import SMALL, model_of

from lorakit import Engine


@pytest.fixture(scope="module")
def model():
    """Of a test file: all of its engines serve it, one after another."""
    return model_of()


@pytest.fixture
def engine(model):
    with Engine(model, SMALL) as engine:
        yield engine
