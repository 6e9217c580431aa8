"""Signals that end a tool, as exceptions: what it began is taken back before it goes.

Owns which signals. Knows nothing of what there is to take back.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP would end us on the spot; as SystemExit they unwind the stack, as Ctrl-C does.

    In another thread than the main one, which alone may set handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(sig: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + sig)

    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [sig for sig in ends if signal.getsignal(sig) != signal.SIG_IGN]  # nohup ignores SIGHUP for us
    previous = {sig: signal.signal(sig, unwind) for sig in heeded}
    try:
        yield
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
