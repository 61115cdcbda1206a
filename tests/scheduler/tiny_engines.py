"""What replicas on Ray make in their own processes: the engine that the tests' processes have, too."""

import dataclasses
from functools import partial
from pathlib import Path

from processes import shared
from served import SMALL, double
from torch import distributed

from lorakit import Engine, MultiLoraModel


def text(tokens):
    """What stop strings are looked for in."""
    return " ".join(map(str, tokens))


def make():
    """An engine of a tiny base, without a bank."""
    return Engine(MultiLoraModel(double()), SMALL, decode=text)


def make_shared(folder):
    """The same of a base in a folder, of which each of a replica's processes has its part."""
    distributed.init_process_group("gloo")
    return Engine(MultiLoraModel(shared(Path(folder))), SMALL, decode=text)


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
