"""What goes wrong in llguidance, or in the threads around it, ends one request and no more."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import pytest
from fake_engine import IM_END, fake_tokenizer

from gqa_serve.engine import grammar_compiler
from gqa_serve.engine.constraints import ConstraintError
from gqa_serve.engine.grammars import choice_grammar
from gqa_serve.engine.structured import GrammarConstraint, GrammarService


class Panic(BaseException):
    """What a panic of native code looks like in Python."""


class PanickingMatcher:
    def consume_tokens(self, tokens: list[int]) -> bool:
        raise Panic("index out of bounds")

    def compute_ff_tokens(self) -> list[int]:
        raise Panic("index out of bounds")

    def compute_bitmask(self) -> bytes:
        raise Panic("index out of bounds")


def constraint(matcher: Any) -> GrammarConstraint:
    return GrammarConstraint(matcher, [IM_END])


def test_a_panic_is_the_end_of_one_request(caplog: pytest.LogCaptureFixture) -> None:
    broken = constraint(PanickingMatcher())
    with pytest.raises(ConstraintError, match="its log says why"):
        broken.append([1])
    with pytest.raises(ConstraintError, match="its log says why"):
        broken.forced()
    assert "index out of bounds" in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_whoever_wants_to_stop_is_heard(stop: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = PanickingMatcher()

    def interrupted(tokens: list[int]) -> bool:
        raise stop

    monkeypatch.setattr(matcher, "consume_tokens", interrupted)
    with pytest.raises(stop):
        constraint(matcher).append([1])


def test_a_panic_in_a_mask_thread_leaves_the_masks_of_others() -> None:
    service = GrammarService(fake_tokenizer, [IM_END])
    whole = [service.begin(choice_grammar(["a"])).result(20) for _ in range(2)]
    broken = [constraint(PanickingMatcher()) for _ in range(2)]
    mixed = [one for pair in zip(broken, whole, strict=True) for one in pair]
    service.prepare([(one, False) for one in mixed])  # each once: no matcher is for two threads
    for one in whole:
        assert one.mask()
        assert one.error is None
    for one in broken:
        assert one.mask() == b""
        assert one.error is not None


def test_whatever_keeps_a_grammar_from_being_compiled_is_told() -> None:
    def load() -> Any:
        raise OSError("no such file")

    future = GrammarService(load, [IM_END]).begin(choice_grammar(["a"]))
    with pytest.raises(ConstraintError, match="its log says why"):
        future.result(20)


def test_a_known_grammar_waits_for_no_other() -> None:
    service = GrammarService(fake_tokenizer, [IM_END])
    known = choice_grammar(["a", "b"])
    service.begin(known).result(20)
    going_on = threading.Event()
    service._compiling.submit(going_on.wait)
    try:
        other = service.begin(choice_grammar(["c"]))
        assert service.begin(known).done()
        assert not other.done()
    finally:
        going_on.set()
    assert other.result(20)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_compiling_yields_to_steps() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert grammar_compiler._on_large_stack(lambda: os.getpriority(os.PRIO_PROCESS, 0)) >= 10
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
