"""Router: each engine's account comes to nothing in the end, and cached prefixes weigh what they save."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from gqa_serve.engine.routing import (
    MAX_OUTPUT_TOKENS,
    MIN_CHUNK_TOKENS,
    Prompt,
    Router,
    Ticket,
    chunk_tokens,
    chunks_of,
)

SIZE = 4
CACHE = 6  # chunks that each replica's cache holds
REPLICAS = 3


def prompt(tokens: Sequence[int], *max_tokens: int) -> Prompt:
    return Prompt(len(tokens), chunks_of(tokens, SIZE), max_tokens)


def router(num_replicas: int = 2, cache_tokens: int = 10**6) -> Router:
    made = Router(num_replicas, SIZE)
    for replica in range(num_replicas):
        made.renew(replica, cache_tokens)
    return made


# Few different tokens, so that prompts begin alike.
tokens_strategy = st.lists(st.integers(0, 1), max_size=40)
prompts_strategy = st.lists(
    st.builds(prompt, tokens_strategy, st.integers(0, 10**5), st.integers(0, 300)), min_size=1, max_size=3
)


class Traffic(RuleBasedStateMachine):
    """Requests that come, are answered and end in any order, over engines that come and go."""

    under_way = Bundle("under_way")

    def __init__(self) -> None:
        super().__init__()
        self.router = router(REPLICAS, CACHE * SIZE + SIZE - 1)
        self.held: dict[Ticket, int] = {}  # where each is

    @rule(target=under_way, prompts=prompts_strategy, ready=st.sets(st.integers(0, REPLICAS - 1)))
    def arrive(self, prompts: list[Prompt], ready: set[int]) -> object:
        order = self.router.order(prompts, ready)
        assert sorted(order) == sorted(ready)
        if not order:
            return multiple()
        best = order[0]
        before = [self.router.outstanding(replica) for replica in range(REPLICAS)]
        tickets = self.router.enter(best, prompts)
        assert len(tickets) == sum(len(one.max_tokens) for one in prompts)
        outputs = sum(min(most, MAX_OUTPUT_TOKENS) for one in prompts for most in one.max_tokens)
        added = self.router.outstanding(best) - before[best]
        assert outputs <= added <= outputs + sum(one.num_tokens for one in prompts)
        others = set(range(REPLICAS)) - {best}
        assert all(self.router.outstanding(other) == before[other] for other in others)
        self.held |= dict.fromkeys(tickets, best)
        return multiple(*tickets)

    @rule(ticket=under_way)
    def answer(self, ticket: Ticket) -> None:
        ticket.answered()

    @rule(ticket=consumes(under_way))
    def end(self, ticket: Ticket) -> None:
        ticket.ended()
        del self.held[ticket]
        left = [self.router.outstanding(replica) for replica in range(REPLICAS)]
        assert min(left) >= 0
        ticket.answered()
        ticket.ended()  # told twice, it counts once
        assert [self.router.outstanding(replica) for replica in range(REPLICAS)] == left

    @rule(replica=st.integers(0, REPLICAS - 1))
    def restart(self, replica: int) -> None:
        self.router.renew(replica, CACHE * SIZE)
        assert self.router.num_known(replica) == 0

    @invariant()
    def what_is_known_fits_the_cache(self) -> None:
        assert all(self.router.num_known(replica) <= CACHE for replica in range(REPLICAS))

    @invariant()
    def an_engine_with_nothing_under_way_owes_nothing(self) -> None:
        for replica in set(range(REPLICAS)) - set(self.held.values()):
            assert self.router.outstanding(replica) == 0

    def teardown(self) -> None:
        for ticket in self.held:
            ticket.ended()
        assert [self.router.outstanding(replica) for replica in range(REPLICAS)] == [0] * REPLICAS


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    shared=st.integers(1, 20),
    own=st.integers(0, 40),
    busy=st.integers(0, 200),
    other_busy=st.integers(0, 200),
)
def test_a_prefix_draws_by_what_it_saves(shared: int, own: int, busy: int, other_busy: int) -> None:
    routes = router()
    prefix = list(range(shared * SIZE))
    (known,) = routes.enter(0, [prompt(prefix, 0)])
    known.ended()
    routes.enter(0, [Prompt(busy, (), [0])])
    routes.enter(1, [Prompt(other_busy, (), [0])])
    assert (routes.outstanding(0), routes.outstanding(1)) == (busy, other_busy)
    assume(busy - shared * SIZE != other_busy)
    asked = prompt([*prefix, *range(1000, 1000 + own)], 1)
    wanted = [0, 1] if busy - shared * SIZE < other_busy else [1, 0]
    assert routes.order([asked], [0, 1]) == routes.order([asked], [1, 0]) == wanted
    assert routes.order([asked], [1]) == [1]


def test_the_least_outstanding_gets_it() -> None:
    routes = router(3)
    for replica, tokens in enumerate((300, 100, 200)):
        routes.enter(replica, [Prompt(tokens, (), [0])])
    assert routes.order([prompt([1], 1)], range(3)) == [1, 2, 0]


def test_of_equals_each_gets_its_turn() -> None:
    routes = router(3)
    got = []
    for number in range(6):
        best = routes.order([prompt([number], 1)], range(3))[0]
        (ticket,) = routes.enter(best, [prompt([number], 1)])
        ticket.ended()
        got.append(best)
    assert got == [0, 1, 2, 0, 1, 2]


def test_a_prompt_counts_once_and_until_it_is_answered() -> None:
    routes = router()
    first, second = routes.enter(0, [prompt(range(10), 100, 10**6)])
    assert routes.outstanding(0) == 10 + 100 + MAX_OUTPUT_TOKENS
    second.answered()  # the prompt is the first one's
    assert routes.outstanding(0) == 10 + 100 + MAX_OUTPUT_TOKENS
    first.answered()
    first.answered()
    assert routes.outstanding(0) == 100 + MAX_OUTPUT_TOKENS
    first.ended()
    assert routes.outstanding(0) == MAX_OUTPUT_TOKENS
    (again,) = routes.enter(0, [prompt(range(10), 0)])
    assert routes.outstanding(0) == MAX_OUTPUT_TOKENS + 10 - 2 * SIZE, "two chunks are cached"
    again.ended()
    second.ended()
    assert routes.outstanding(0) == 0


def test_a_new_process_has_no_prefixes() -> None:
    routes = router()
    asked = prompt(range(40), 0)
    for replica in (0, 1):
        routes.enter(replica, [asked])[0].ended()
    routes.renew(1, 1000)
    assert routes.order([asked], [0, 1]) == [0, 1]
    routes.renew(0, 1000)
    assert routes.order([asked], [0, 1]) == [0, 1], "in turn"


def test_the_ends_of_old_prefixes_are_forgotten_first() -> None:
    routes = router(2, 4 * SIZE)
    old, new = prompt(range(3 * SIZE), 0), prompt(range(100, 100 + 3 * SIZE), 0)
    routes.enter(0, [old])
    routes.enter(0, [new])
    before = routes.outstanding(0)
    routes.enter(0, [Prompt(3 * SIZE, old.chunks, [0])])
    assert routes.outstanding(0) - before == 2 * SIZE, "its first chunk is still known"


@given(one=tokens_strategy, other=tokens_strategy)
def test_chunks_are_equal_as_far_as_prompts_are(one: list[int], other: list[int]) -> None:
    equal = 0
    while equal < min(len(one), len(other)) and one[equal] == other[equal]:
        equal += 1
    pairs = zip(chunks_of(one, SIZE), chunks_of(other, SIZE), strict=False)
    assert [a == b for a, b in pairs].count(True) == equal // SIZE
    assert len(chunks_of(one, SIZE)) == len(one) // SIZE
    assert not set(chunks_of(one, SIZE)) & set(chunks_of(one, SIZE, "salt"))


@given(st.integers(1, 1024))
def test_a_chunk_is_whole_blocks(block_size: int) -> None:
    size = chunk_tokens(block_size)
    assert size % block_size == 0
    assert MIN_CHUNK_TOKENS <= size < MIN_CHUNK_TOKENS + block_size
