"""What it costs to choose one of several engines for a request, beside what sending it costs anyway.

    python benchmarks/routing.py --replicas 8

For prompts of several lengths, in microseconds a request: hashing the prompt in chunks; putting the engines
in order, entering the choice and taking it out again; packing the same request as the message to its engine.
Everything is measured in one run, in turns; the best of several rounds counts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable

from gqa_serve.engine.request import EngineRequest, SamplingParams
from gqa_serve.engine.routing import Prompt, Router, chunk_tokens, chunks_of
from gqa_serve.engine.wire import Add, frame

BLOCK_SIZE = 16
ROUNDS = 7


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[30, 300, 3000, 30_000])
    options = parser.parse_args()
    print(f"{'prompt tokens':>14} {'hashing':>10} {'routing':>10} {'packing':>10}   us a request")
    for length in options.lengths:
        hashing, routing, packing = measure(options.replicas, length)
        print(f"{length:>14} {hashing:>10.1f} {routing:>10.1f} {packing:>10.1f}")


def measure(num_replicas: int, length: int) -> tuple[float, float, float]:
    """Microseconds for hashing, for routing, for packing; all prompts share their first half."""
    rng = random.Random(length)
    tokens = range(100_000)
    shared = rng.choices(tokens, k=length // 2)
    prompts = [[*shared, *rng.choices(tokens, k=length - length // 2)] for _ in range(32)]
    size = chunk_tokens(BLOCK_SIZE)
    hashed = [Prompt(length, chunks_of(prompt, size), (256,)) for prompt in prompts]
    router = Router(num_replicas, size)
    for replica in range(num_replicas):
        router.renew(replica, 64 * length)
    requests = [
        EngineRequest(request_id=f"cmpl-{number:032x}-0", prompt=prompt, params=SamplingParams(max_tokens=9))
        for number, prompt in enumerate(prompts)
    ]

    def route() -> None:
        for prompt in hashed:
            replica = router.order([prompt], range(num_replicas))[0]
            (ticket,) = router.enter(replica, [prompt])
            ticket.answered()
            ticket.ended()

    works: list[Callable[[], object]] = [
        lambda: [chunks_of(prompt, size) for prompt in prompts],
        route,
        lambda: [frame(Add(request)) for request in requests],
    ]
    best = [float("inf")] * len(works)
    for _ in range(ROUNDS):
        for number, work in enumerate(works):
            began = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - began)
    hashing, routing, packing = (seconds / len(prompts) * 1e6 for seconds in best)
    return hashing, routing, packing


if __name__ == "__main__":
    main()
