"""What replicas on Ray make in their own processes: the engine that the tests' processes have, too."""

from served import SMALL, double

from lorakit import Engine, MultiLoraModel


def text(tokens):
    """What stop strings are looked for in."""
    return " ".join(map(str, tokens))


def make():
    """An engine of a tiny base, without a bank."""
    return Engine(MultiLoraModel(double()), SMALL, decode=text)
