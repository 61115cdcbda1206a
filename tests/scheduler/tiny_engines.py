"""What replicas on Ray make in their own processes: the engine that the tests' processes have, too."""

import dataclasses
from functools import partial
from pathlib import Path

from served import SMALL, double

from lorakit import Engine, MultiLoraModel


def text(tokens):
    """What stop strings are looked for in."""
    return " ".join(map(str, tokens))


def make():
    """An engine of a tiny base, without a bank."""
    return Engine(MultiLoraModel(double()), SMALL, decode=text)


def make_picky(folder):
    """The same; but of the replicas that share a folder the first one alone can read adapters."""
    place = Path(folder)
    engine = make()
    try:
        (place / "first").touch(exist_ok=False)
    except FileExistsError:

        def read(*_):
            raise OSError("the disk is broken")

        engine.model.know_adapter = partial(_unreadable, engine.model.know_adapter, read)
    return engine


def _unreadable(know, read, name, key, reader, invocation=None):
    know(name, key, dataclasses.replace(reader, read_into=read), invocation)
