"""Signals that end a tool unwind it; those that somebody ignores for it stay ignored."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from gqa_serve.workbench.signals import signals_as_exceptions


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Handlers as they were, whatever a test did."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for sig, handler in before.items():
        signal.signal(sig, handler)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_and_handlers_are_as_they_were(sig: signal.Signals) -> None:
    signal.signal(sig, signal.SIG_DFL)  # the tests may run under nohup
    with pytest.raises(SystemExit) as ended, signals_as_exceptions():
        signal.raise_signal(sig)
    assert ended.value.code == 128 + sig
    assert signal.getsignal(sig) == signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_as_exceptions():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
