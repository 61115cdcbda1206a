"""Every error a user can cause, each naming the thing at fault and the remedy.

All derive from `LorakitError`, and from the built-in kind that a caller would expect (`ValueError`, `KeyError`, …), so
that both `except LorakitError` and `except ValueError` read naturally. They are raised before any work is done:
nothing is written, nothing already loaded is disturbed. Assertions in this package guard our own invariants only.
"""


class LorakitError(Exception):
    """The base of all errors that lorakit raises on purpose."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument; a sentence should be read as a sentence.
        return " ".join(str(argument) for argument in self.args)


class CheckpointError(LorakitError, ValueError):
    """A PEFT checkpoint cannot be read: missing files or keys, extra keys, broken or unsafe tensors."""


class ShapeMismatchError(CheckpointError):
    """A tensor of the checkpoint does not fit the base model's module, or its own configuration."""


class NonFiniteWeightsError(CheckpointError):
    """A tensor of the checkpoint holds NaN or Inf."""


class UnsupportedMethodError(LorakitError, NotImplementedError):
    """The checkpoint uses a PEFT method or option that has no exact form in lorakit."""


class BaseModelNotFoundError(LorakitError, LookupError):
    """The base model cannot be found or read."""


class BaseModelMismatchError(LorakitError, ValueError):
    """An adapter or a bank was made for another base model."""


class ModuleNotFoundInBaseError(LorakitError, LookupError):
    """An adapter names a module that the base model does not have, or that cannot carry an adapter."""


class AdapterNameError(LorakitError, ValueError):
    """A name that an adapter cannot have."""


class AdapterNotFoundError(LorakitError, KeyError):
    """No adapter of this name is in the bank or the model."""


class AdapterExistsError(LorakitError, ValueError):
    """An adapter of this name is already there."""


class AdapterIdsError(LorakitError, ValueError):
    """`adapter_ids` does not fit the batch."""


class BankError(LorakitError, ValueError):
    """The folder is no bank, its index is broken, or it was written by a newer lorakit."""


class BankCorruptedError(BankError):
    """Bytes of a bank are not what its index says."""


class HubError(LorakitError, OSError):
    """The Hub cannot be reached, is busy, or did not give or take what was asked for."""


class HubNotFoundError(HubError, LookupError):
    """The Hub has no such repository or revision, or does not show it to this token."""


class HubAccessError(HubError, PermissionError):
    """The Hub refuses: a gated repository, or a token that may not do this."""


class ConfigError(LorakitError, ValueError):
    """A recipe's configuration, an argument or an option has an unknown name or a value that cannot be."""


class MissingDependencyError(LorakitError, ImportError):
    """An optional package is needed for what was asked."""


class PoolFullError(LorakitError, MemoryError):
    """The adapters of one batch do not fit the memory set aside for adapters."""


class RequestError(LorakitError, ValueError):
    """A request asks for what cannot be: a parameter out of range, a token that does not exist, a prompt too long."""


class ModelInUseError(LorakitError, RuntimeError):
    """The model is being served by an engine, so it cannot be called directly or given to another one."""


class EngineError(LorakitError, RuntimeError):
    """The engine cannot serve a request."""


class EngineBusyError(EngineError):
    """So much waits already that no more is taken.

    Attributes:
        retry_after: seconds after which a place is likely to be free.
    """

    def __init__(self, *args: object, retry_after: float = 1.0) -> None:
        super().__init__(*args)
        self.retry_after = retry_after


class EngineStoppedError(EngineError):
    """The engine was not started, or was stopped with the request still open."""


class SupersededError(EngineStoppedError):
    """Another server has taken over the replicas of this one, which was away for too long."""


class EngineCrashedError(EngineError):
    """The engine's loop failed with the request open; its cause is the error."""


class DeadlineExceededError(LorakitError, TimeoutError):
    """A request was not done by its deadline; the tokens that it has can still be read."""


class AccountError(LorakitError, ValueError):
    """A server's tenants: the file is none, a tenant or a key is not there, or a limit cannot be."""
