"""`import lorakit`: light, complete, and honest about what it has."""

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import lorakit
import lorakit.errors
from lorakit.errors import LorakitError

HEAVY = {"torch", "transformers", "peft", "numpy", "safetensors", "huggingface_hub", "accelerate"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import lorakit",
        "import lorakit; lorakit.__version__; dir(lorakit)",
        "import lorakit.errors",
        "from lorakit import LorakitError",
        "import lorakit.cli",
        "import lorakit.console",
    ],
)
def test_importing_is_light(code):
    assert run(f"{code}\nimport sys; print(*({HEAVY} & sys.modules.keys()))") == ""


def test_reading_a_bank_needs_no_peft(tmp_path):
    code = "import sys, lorakit; lorakit.AdapterBank; print('peft' in sys.modules, 'transformers' in sys.modules)"
    assert run(code) == "False False"


def test_the_version_is_the_packages():
    assert lorakit.__version__ == version("lorakit")


@pytest.mark.parametrize("name", lorakit.__all__)
def test_each_name_is_there_and_documented(name):
    thing = getattr(lorakit, name)
    assert thing.__name__ == name and inspect.getdoc(thing)
    assert thing is getattr(lorakit, name), "the same each time"
    assert getattr(importlib.import_module(thing.__module__), name) is thing


def test_the_list_of_names():
    assert dir(lorakit) == sorted(lorakit.__all__) == lorakit.__all__
    namespace = {}
    exec("from lorakit import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(lorakit.__all__)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'lorakit' has no attribute 'MultiLora'"):
        _ = lorakit.MultiLora
    with pytest.raises(ImportError, match="cannot import name 'MultiLora'"):
        from lorakit import MultiLora  # noqa: F401
    assert not hasattr(lorakit, "__wrapped__")


ERRORS = [
    thing
    for thing in vars(lorakit.errors).values()
    if isinstance(thing, type) and issubclass(thing, Exception) and thing.__module__ == "lorakit.errors"
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_are_lorakits_and_of_a_kind_that_python_knows(error):
    assert issubclass(error, LorakitError) and inspect.getdoc(error)
    if error is not LorakitError:
        assert any(base.__module__ == "builtins" and base is not Exception for base in error.__mro__[:-3])
    assert str(error("a sentence with 'quotes'.")) == "a sentence with 'quotes'."
    assert str(error()) == ""
