"""One run at a time in a folder.

Owns the lock, which the system takes back when its process ends, however it ends.
Invariant: the lock's file is never deleted while a run goes on, or two could hold a lock of one name.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from gqa_serve.errors import ConfigError

_LOCK = "lock"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which exists. Raises ConfigError where another process has it."""
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context((folder / _LOCK).open("a"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"Another process trains in {folder.parent}; wait for it, stop it, or give another --output."
            ) from error
        except OSError as error:
            raise ConfigError(
                f"{folder} can't be locked ({error.strerror}); give an --output elsewhere."
            ) from error
        yield


def clear(folder: Path) -> None:
    """Delete all that is in `folder` but its lock."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
