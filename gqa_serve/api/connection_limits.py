"""`ConnectionLimits`: how many connections there may be, and how long each may take to read and write.

Owns the numbers and how many refused connections there are, for all connections of one server together, and
the file descriptors that they need. Knows no HTTP. Invariant: what the system allows is never promised away:
where it allows fewer descriptors than `max_connections` take, the limit is lowered, so that clients get an
answer instead of a silence.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)

REFUSED_AT_ONCE = 256  # connections beyond the limit that are given the time to read why
SEND_BUFFER_BYTES = 256 * 1024  # in the kernel, for each; by itself it takes megabytes for who does not read
OTHER_FILES = 128  # the engine, its pipes, the model's files, libraries


@dataclasses.dataclass
class ConnectionLimits:
    """Times in seconds; a `read_timeout_s` of 0 is no limit."""

    read_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    max_connections: int = 4096
    num_refused: int = 0
    """Refused connections that are not closed yet."""
    idle: dict[object, float] = dataclasses.field(default_factory=dict)
    """Connections between two requests and since when, the longest first."""
    closing: bool = False
    """The server stops: whatever is answered, the connection closes after it."""
    on_refusal: Callable[[str], None] = lambda reason: None
    """Called with a word for the metrics for each request that never gets to the application."""


def with_files_for(max_connections: int) -> int:
    """Raise the limit of open files to what so many connections need; returns how many it is enough for."""
    if sys.platform == "win32":
        return max_connections
    import resource

    needed = max_connections + REFUSED_AT_ONCE + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return max_connections
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (ValueError, OSError) as error:  # macOS has a lower limit that it does not tell
        logger.warning("The limit of open files stays %d: %s.", soft, error)
        allowed = soft
    if allowed == needed:
        return max_connections
    possible = max(1, allowed - REFUSED_AT_ONCE - OTHER_FILES)
    logger.warning(
        "The system allows %d open files, which is enough for %d connections instead of --max-connections "
        "%d; raise its hard limit (ulimit -Hn).",
        allowed,
        possible,
        max_connections,
    )
    return possible
