"""The account of what waits, and how honest `Retry-After` is."""

from __future__ import annotations

from fake_runner import request
from hypothesis import given
from hypothesis import strategies as st

from gqa_serve.engine.admission import MAX_RETRY_S, MIN_RETRY_S, Admission
from gqa_serve.errors import QueueFullError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(admission: Admission, *prompts: int) -> int | None:
    """After how many seconds requests with such prompts may come again; None if they may come in now."""
    try:
        admission.check([request("new", [5] * length) for length in prompts])
    except QueueFullError as error:
        return error.retry_after_s
    return None


def served(admission: Admission, clock: Clock, count: int, seconds: float, prompt: int = 10) -> None:
    """`count` requests come and end one after the other, each in `seconds`."""
    for number in range(count):
        name = f"served{clock.now}-{number}"
        admission.enter(request(name, [5] * prompt))
        admission.begun([name])
        clock.now += seconds
        admission.leave(name)


def test_a_full_queue_says_when_as_many_will_have_ended() -> None:
    clock = Clock()
    admission = Admission(4, 10**6, clock)
    served(admission, clock, 50, 0.5)  # two a second
    for number in range(4):
        admission.enter(request(f"held{number}", [5]))
    assert refused(admission, 1) == 1
    assert refused(admission, *[1] * 4) == 2
    served_slowly = Admission(4, 10**6, clock)
    served(served_slowly, clock, 20, 5.0)
    for number in range(4):
        served_slowly.enter(request(f"held{number}", [5]))
    assert refused(served_slowly, 1) == 5
    assert 18 <= (refused(served_slowly, *[1] * 4) or 0) <= 20


def test_rates_forget_what_was_long_ago() -> None:
    clock = Clock()
    admission = Admission(1, 10**6, clock)
    served(admission, clock, 100, 0.1)
    served(admission, clock, 30, 10.0)
    admission.enter(request("held", [5]))
    assert 9 <= (refused(admission, 1) or 0) <= 10


def test_a_pause_is_not_taken_for_slowness() -> None:
    clock = Clock()
    admission = Admission(1, 10**6, clock)
    served(admission, clock, 50, 0.5)
    clock.now += 3600
    admission.enter(request("held", [5]))
    assert refused(admission, 1) == 1


def test_as_long_as_nothing_has_ended_it_takes_as_long_again() -> None:
    clock = Clock()
    admission = Admission(1, 10**6, clock)
    admission.enter(request("held", [5]))
    assert refused(admission, 1) == MIN_RETRY_S
    clock.now += 7
    assert 6 <= (refused(admission, 1) or 0) <= 7
    clock.now += 10_000
    assert 29 <= (refused(admission, 1) or 0) <= 30  # as far as it remembers
    assert refused(Admission(0, 1, clock), *[1] * 1000) == MIN_RETRY_S


def test_waiting_prompts_say_when_their_tokens_will_have_begun() -> None:
    clock = Clock()
    admission = Admission(100, 1000, clock)
    served(admission, clock, 20, 1.0, prompt=100)  # 100 prompt tokens a second
    assert refused(admission, 5000) is None  # nobody waits
    admission.enter(request("large", [5] * 1000))
    assert 3 <= (refused(admission, 300) or 0) <= 4
    assert 10 <= (refused(admission, 5000) or 0) <= 11  # then nobody waits
    admission.begun(["large"])
    assert refused(admission, 300) is None
    assert admission.num_waiting_tokens == 0


def test_no_estimate_is_beyond_its_bounds() -> None:
    clock = Clock()
    admission = Admission(1, 10**6, clock)
    served(admission, clock, 20, 1000.0)
    admission.enter(request("held", [5]))
    assert refused(admission, 1) == 30
    assert refused(admission, *[1] * 1000) == MAX_RETRY_S


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "begun", "leave"]), st.integers(0, 5), st.integers(0, 9)),
        max_size=60,
    )
)
def test_what_waits_is_what_entered_and_neither_began_nor_left(steps: list[tuple[str, int, int]]) -> None:
    clock = Clock()
    admission = Admission(10**6, 10**6, clock)
    waiting: dict[str, int] = {}
    held: set[str] = set()
    for what, number, amount in steps:
        name = f"r{number}"
        clock.now += amount
        if what == "enter" and name not in held:
            admission.enter(request(name, [5] * (amount + 1)))
            waiting[name] = amount + 1
            held.add(name)
        elif what == "begun":
            admission.begun([name])
            waiting.pop(name, None)
        elif what == "leave" and name in held:
            admission.leave(name)
            waiting.pop(name, None)
            held.discard(name)
        assert admission.num_waiting_tokens == sum(waiting.values())
