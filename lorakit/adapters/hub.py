"""The Hub as banks see it: ids of repositories, and what its refusals mean.

The talking is huggingface_hub's: tokens, endpoints, caches and retries follow its rules and its environment
variables. Knows the client's errors; knows no bank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lorakit.errors import HubAccessError, HubError, HubNotFoundError

CLIENT_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, HFValidationError)
"""What huggingface_hub raises: its HTTP library's own errors are bases of its own, whichever library that is."""


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a repository's id, as "org/bank"."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def library() -> dict[str, Any]:
    """How requests name who asks."""
    try:
        return {"library_name": "lorakit", "library_version": version("lorakit")}
    except PackageNotFoundError:
        return {"library_name": "lorakit"}


@contextmanager
def asking(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of huggingface_hub into `HubError`s.

    Args:
        repo_id: the repository that is asked for, for messages.
        revision: likewise.
    """
    try:
        yield
    except (HubError, BrokenPipeError):
        raise
    except CLIENT_ERRORS as error:
        raise translated(error, repo_id, revision) from error


def translated(error: Exception, repo_id: str, revision: str | None = None) -> HubError:
    """What an error of huggingface_hub means, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
    login = "log in with `hf auth login`, set HF_TOKEN, or pass token="
    if isinstance(error, GatedRepoError):
        return HubAccessError(f"the repository {repo_id!r} is gated: ask for access on its page, then {login}.")
    if isinstance(error, RepositoryNotFoundError):
        return HubNotFoundError(
            f"the Hub shows no repository {repo_id!r}, and there is no such folder here: check its spelling. If the "
            f"repository is private, {login}."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubNotFoundError(f"the repository {repo_id!r} has no revision {revision or 'main'!r}: name another.")
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return HubError(
            f"what is needed of {repo_id!r} is not in the cache, and HF_HUB_OFFLINE is set: unset it once, or pull the "
            "bank where there is a network."
        )
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            return translated(cause, repo_id, revision)
        return HubError(
            f"the Hub cannot be reached for {repo_id!r}, and the cache does not hold it: check the network and "
            f"HF_ENDPOINT ({_first_line(cause or error)})."
        )
    if isinstance(error, EntryNotFoundError):
        return HubNotFoundError(f"the repository {repo_id!r} lacks a file: {_first_line(error)}.")
    if isinstance(error, HFValidationError):
        return HubNotFoundError(f"{repo_id!r} is no id of a repository: {_first_line(error)}.")
    if status in (401, 403):
        return HubAccessError(f"the Hub refuses this for {repo_id!r} ({_first_line(error)}): {login}.")
    if status == 429:
        return HubError(
            f"the Hub takes no more requests from you just now, for {repo_id!r}: try again later; what has arrived is "
            "kept."
        )
    if status >= 500:
        return HubError(
            f"the Hub failed with status {status}, for {repo_id!r}: try again later; what has arrived is kept."
        )
    if status:
        return HubError(f"the Hub refuses this for {repo_id!r} ({_first_line(error)}).")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return HubError(
            f"the cache cannot be read or written, for {repo_id!r}: {error.strerror} ({error.filename}). Free space or "
            "fix its permissions, or set HF_HOME to another folder."
        )
    return HubError(
        f"the connection to the Hub broke, for {repo_id!r} ({_first_line(error)}): try again; what has arrived is kept."
    )


def _first_line(error: BaseException) -> str:
    """What the server says, or else the client."""
    text = (error.server_message if isinstance(error, HfHubHTTPError) else None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
