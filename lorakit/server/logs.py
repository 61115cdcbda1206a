"""The server's log: lines for people, or JSON for machines."""

from __future__ import annotations

import logging
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

from lorakit.server.faults import log

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(name)s %(levelname)s %(message)s"
_RENAMED = {"asctime": "time", "name": "logger", "levelname": "level"}


def begin_log(format: LogFormat) -> None:
    """Writes it to standard error from now on, with what the libraries below have to say.

    Args:
        format: "json" has an object a line, in which a request's id, path, status, seconds and tenant are fields.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(_TEXT, rename_fields=_RENAMED) if format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(handlers=[handler])
    for one in (log, logging.getLogger("lorakit.scheduler")):
        one.setLevel(logging.INFO)
