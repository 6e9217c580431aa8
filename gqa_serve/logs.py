"""How both processes log: one line a record, on standard error, as text or as JSON.

Owns the two formats. A record made with `extra={"fields": {...}}` carries these as values of their own in
JSON; its message says the same to people. Invariant: with JSON every line is one object, exceptions included,
in ASCII, whatever the locale of the process is.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from typing import Any

from gqa_serve.unblocked import unblocked

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s{}: %(message)s"
_LOST = "%d messages could not be written here."
# Libraries whose own chatter at "info" says nothing an operator needs.
_CLIENTS = ("httpx2", "httpcore2", "httpx", "httpcore")  # the last two: of huggingface_hub before 2
_QUIET = (*_CLIENTS, "huggingface_hub", "uvicorn", "asyncio", "sse_starlette", "filelock")


class JsonFormatter(logging.Formatter):
    """A record as one JSON object: time, level, logger, process, message, its fields, its exception."""

    def __init__(self, process: str, replica: int | None = None) -> None:
        super().__init__()
        self._process = {"process": process} | ({} if replica is None else {"replica": replica})

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._process,
            "pid": os.getpid(),
            "message": _message(record),
        }
        fields = getattr(record, "fields", {})
        line |= {name: value for name, value in fields.items() if value is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _message(record: logging.LogRecord) -> str:
    """One whose arguments do not fit would otherwise be a traceback in the middle of the lines."""
    try:
        return record.getMessage()
    except Exception:
        return f"{record.msg} {record.args!r}"


def configure_logging(
    level: str, log_format: str = "text", *, process: str = "api", replica: int | None = None
) -> None:
    """Log this package at `level` and others from "warning" on ("debug" opens them up too).

    `log_format` is "text" or "json"; `process` says which of the two processes this is, `replica` which
    engine, if there are several.
    """
    formatter: logging.Formatter
    if log_format == "json":
        formatter = JsonFormatter(process, replica)
    else:
        formatter = logging.Formatter(_FORMAT.format("" if replica is None else f" [replica {replica}]"))

    def tell_lost(count: int) -> str:
        values = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
        return formatter.format(logging.makeLogRecord({**values, "msg": _LOST, "args": (count,)}))

    handler = logging.StreamHandler(unblocked(sys.stderr, tell_lost))
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(log_format == "json")  # or they would be lines of their own
    if level != "debug":
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)  # its "debug" shows every answer
