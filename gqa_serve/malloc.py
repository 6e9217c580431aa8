"""How the C library's allocator keeps memory, where it is glibc's.

Owns one setting. glibc gives up to eight arenas for each core to threads that allocate at the same time, and
what a thread once needed for a large prompt stays in its arena: a server with worker threads grows by some
MiB whenever another of them meets its first large request. Two arenas are enough for threads that hold one
lock (the interpreter's) nearly all the time. Elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

_M_ARENA_MAX = -8  # malloc.h


def limit_arenas(count: int = 2) -> bool:
    """Let threads share `count` arenas from now on; whether the allocator understood."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(_M_ARENA_MAX, count))
