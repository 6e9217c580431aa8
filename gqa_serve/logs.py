"""How both processes log: one line a record, on standard error."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Libraries whose own chatter at "info" says nothing an operator needs.
_QUIET = ("httpx2", "httpcore2", "huggingface_hub", "uvicorn", "asyncio", "sse_starlette", "filelock")


def configure_logging(level: str) -> None:
    """Log this package at `level` and others from "warning" on ("debug" opens them up too)."""
    logging.basicConfig(level=level.upper(), format=_FORMAT, force=True)
    if level != "debug":
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)
