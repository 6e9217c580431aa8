"""Traffic from flags: what `bench` sends and `simulate` replays, generated or read from a file.

Owns the flags, what may go with what, and how requests, shared prefixes and conversations are put together
from arrivals (`arrivals.py`), lengths (`distributions.py`) and the user's own traffic (`datasets.py`).
Knows no server and no clock; needs a tokenizer only for a dataset of text.
Invariant: the same flags give the same requests. Each property (arrivals, prompts, outputs, ...) has a
random stream of its own, so that changing one of them leaves the others as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gqa_serve.errors import ConfigError
from gqa_serve.workbench.arrivals import PROCESSES, arrival_times
from gqa_serve.workbench.datasets import CountTokens, Exchange, read_dataset
from gqa_serve.workbench.distributions import NOTATION, Distribution, parse_distribution
from gqa_serve.workbench.trace import TraceRequest, checked, read_trace

LENGTHS_HELP = f"Lengths and times are written as\n{NOTATION}"
_STREAMS = ("arrivals", "prompt", "output", "prefix", "prefix choice", "turns", "think", "dataset")
_DEFAULT_REQUESTS = 100
_512 = Distribution("constant", (512,))
_128 = Distribution("constant", (128,))
_1 = Distribution("constant", (1,))
_0 = Distribution("constant", (0,))


def add_traffic_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `traffic_from`; all default to None, which is filled in there. Help: LENGTHS_HELP."""
    group = parser.add_argument_group("traffic")
    add = group.add_argument
    add("--num-requests", type=int, metavar="N", help="how many; default 100, or all of a trace")
    add("--prompt-len", metavar="LENGTH", help="new tokens of a prompt; default 512")
    add("--output-len", metavar="LENGTH", help="tokens of an answer; default 128, or as in the dataset")
    add("--rate", type=float, metavar="R", help="requests a second; default: no rate, all arrive at once")
    add("--arrivals", choices=PROCESSES, help="how they arrive; default poisson with --rate, else all")
    add(
        "--burstiness",
        type=float,
        metavar="CV",
        help="coefficient of variation of the gaps with --arrivals gamma: 1 is poisson, 2 comes in bursts",
    )
    add("--seed", type=int, metavar="N", help="another seed is other traffic of the same kind; default 0")

    group = parser.add_argument_group("what requests share")
    add = group.add_argument
    add("--prefixes", type=int, metavar="N", help="number of shared prefixes (system prompts); default none")
    add("--prefix-len", metavar="LENGTH", help="their tokens, before those of --prompt-len; default 512")
    add(
        "--prefix-skew",
        type=float,
        metavar="S",
        help="prefix k is chosen as often as 1/k^S; default 0: all alike; 1 is Zipf's law",
    )
    add("--turns", metavar="COUNT", help="requests of a conversation, each with all before it; default 1")
    add("--think", metavar="SECONDS", help="time from an answer to the next turn; default 0")

    group = parser.add_argument_group("your own traffic")
    add = group.add_argument
    add(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="draw requests from ShareGPT JSON, or JSON lines with prompt and output, messages, or "
        "prompt_tokens and output_tokens",
    )
    add("--tokenizer", metavar="MODEL", help="what counts and makes tokens: hub id, directory, GGUF file")
    add("--trace", type=Path, metavar="FILE", help="replay these requests (docs/workbench/bench.md)")
    add("--speed", type=float, metavar="F", help="replay the trace F times as fast; default 1")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Checked settings of traffic to generate. `num_requests` None: all of the trace, else 100."""

    num_requests: int | None = None
    prompt_len: Distribution = _512
    output_len: Distribution | None = None
    rate: float | None = None
    arrivals: str = "all"
    burstiness: float = 1.0
    seed: int = 0
    num_prefixes: int = 0
    prefix_len: Distribution = _512
    prefix_skew: float = 0.0
    turns: Distribution = _1
    think: Distribution = _0
    dataset: Path | None = None
    tokenizer: str | None = None
    trace: Path | None = None
    speed: float = 1.0

    def requests(self, count_tokens: CountTokens | None = None) -> list[TraceRequest]:
        """The requests, sorted by arrival. Raises ConfigError for files that can't be used.

        `count_tokens` counts the tokens of a dataset's texts; without it the tokenizer is found by name.
        """
        if self.trace is not None:
            kept = read_trace(self.trace)[: self.num_requests]  # sorted, so no turn is kept without the first
            return [replace(one, arrival_s=one.arrival_s / self.speed) for one in kept]
        streams = dict(zip(_STREAMS, np.random.SeedSequence(self.seed).spawn(len(_STREAMS)), strict=True))
        random = {name: np.random.default_rng(stream) for name, stream in streams.items()}
        count = _DEFAULT_REQUESTS if self.num_requests is None else self.num_requests
        if self.dataset is None:
            conversations = self._synthetic(count, random)
        else:
            conversations = self._drawn(self.dataset, count, random, count_tokens)
        return self._assembled(conversations, random)

    def _synthetic(self, count: int, random: dict[str, np.random.Generator]) -> list[list[Exchange]]:
        """Conversations with `count` requests in all; the last one is cut."""
        sizes = _fill(count, self.turns, random["turns"])
        prompts = self.prompt_len.draw_counts(count, random["prompt"])
        outputs = (self.output_len or _128).draw_counts(count, random["output"])
        exchanges = iter([Exchange(*pair) for pair in zip(prompts, outputs, strict=True)])
        return [[next(exchanges) for _ in range(size)] for size in sizes]

    def _drawn(
        self,
        path: Path,
        count: int,
        random: dict[str, np.random.Generator],
        count_tokens: CountTokens | None,
    ) -> list[list[Exchange]]:
        """Conversations of the dataset in random order, again from the start when all are used."""
        if count_tokens is None and self.tokenizer is not None:
            count_tokens = token_counter(self.tokenizer)
        pool = read_dataset(path, output_tokens=1 if self.output_len else 0)
        longest = round(self.turns.parameters[0])
        drawn: list[list[Exchange]] = []
        missing = count
        while missing > 0:
            for index in random["dataset"].permutation(len(pool)).tolist():
                turns = pool[index][: min(longest, missing)]
                missing -= len(turns)
                drawn += [[one.counted(count_tokens) for one in turns]] if turns else []
        if self.output_len is not None:
            lengths = iter(self.output_len.draw_counts(count, random["output"]))
            drawn = [[replace(one, output_tokens=next(lengths)) for one in turns] for turns in drawn]
        return drawn

    def _assembled(
        self, conversations: list[list[Exchange]], random: dict[str, np.random.Generator]
    ) -> list[TraceRequest]:
        """Requests: prefixes before first turns, all earlier tokens before later ones; with arrivals."""
        total = sum(map(len, conversations))
        # A rate counts requests, and each conversation brings several.
        rate = (self.rate or 1.0) * len(conversations) / total
        starts = arrival_times(
            self.arrivals, len(conversations), rate, random["arrivals"], burstiness=self.burstiness
        )
        thinks = iter(self.think.draw(total, random["think"]).tolist())
        prefixes = self._prefixes(len(conversations), random)
        requests = []
        for number, (turns, start) in enumerate(zip(conversations, starts, strict=True)):
            prefix, before = prefixes[number]
            shared = before
            for turn, exchange in enumerate(turns):
                requests.append(
                    TraceRequest(
                        arrival_s=0.0 if turn else start,
                        prompt_tokens=before + exchange.prompt_tokens,
                        output_tokens=exchange.output_tokens,
                        prefix=prefix,
                        prefix_tokens=shared,
                        conversation=f"c{number}" if len(turns) > 1 else None,
                        turn=turn,
                        think_s=max(0.0, next(thinks)) if turn else 0.0,
                        prompt=exchange.prompt,
                    )
                )
                before += exchange.prompt_tokens + exchange.output_tokens
        return checked(requests, "the traffic")

    def _prefixes(self, count: int, random: dict[str, np.random.Generator]) -> list[tuple[str | None, int]]:
        """(name, tokens) for every conversation."""
        if not self.num_prefixes:
            return [(None, 0)] * count
        lengths = self.prefix_len.draw_counts(self.num_prefixes, random["prefix"])
        weights = np.arange(1, self.num_prefixes + 1, dtype=np.float64) ** -self.prefix_skew
        chosen = random["prefix choice"].choice(self.num_prefixes, count, p=weights / weights.sum())
        return [(f"p{index}", lengths[index]) for index in chosen.tolist()]


def traffic_from(args: argparse.Namespace, count_tokens: CountTokens | None = None) -> list[TraceRequest]:
    """The requests that the flags of `add_traffic_flags` ask for. Raises ConfigError."""
    return read_traffic(args).requests(count_tokens)


def read_traffic(args: argparse.Namespace) -> Traffic:
    """The flags, checked. Raises ConfigError for values and combinations that make no sense."""
    given = {name for name in _NAMES if getattr(args, name) is not None}
    if args.trace is not None:
        _refuse(given - {"trace", "num_requests", "speed", "tokenizer"}, "a trace has its own")
    elif args.speed is not None:
        raise ConfigError("--speed is for replaying a --trace; otherwise choose the --rate.")
    if args.dataset is not None:
        _refuse(given & {"prompt_len"}, "prompts come from the dataset")
    for name in ("num_requests", "rate", "burstiness", "prefixes", "speed"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{_flag(name)} must be more than 0; got {value}.")
    for name in ("seed", "prefix_skew"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            raise ConfigError(f"{_flag(name)} must not be negative.")
    arrivals = args.arrivals or ("poisson" if args.rate is not None else "all")
    _check_arrivals(args, arrivals)
    return _traffic(args, arrivals)


def token_counter(tokenizer: str) -> CountTokens:
    """Counts tokens with the tokenizer of this name, without a beginning-of-sequence token."""
    from gqa_serve.workbench.tokenizer_source import find_tokenizer

    found = find_tokenizer(tokenizer)
    return lambda text: len(found.encode(text, add_special_tokens=False))


_NAMES = (
    "num_requests", "prompt_len", "output_len", "rate", "arrivals", "burstiness", "seed", "prefixes",
    "prefix_len", "prefix_skew", "turns", "think", "dataset", "tokenizer", "trace", "speed",
)  # fmt: skip


def _check_arrivals(args: argparse.Namespace, arrivals: str) -> None:
    if arrivals == "all" and args.rate is not None:
        raise ConfigError("--arrivals all has no --rate; leave one of them out.")
    if arrivals != "all" and args.rate is None:
        raise ConfigError(f"--arrivals {arrivals} needs a --rate, in requests a second.")
    if args.burstiness is not None and arrivals != "gamma":
        raise ConfigError("--burstiness is for --arrivals gamma.")
    if args.prefixes is None and args.prefix_skew is not None:
        raise ConfigError("--prefix-skew is for several --prefixes.")


def _traffic(args: argparse.Namespace, arrivals: str) -> Traffic:
    def length(name: str, low: float = 1.0) -> Distribution | None:
        text = getattr(args, name)
        return None if text is None else parse_distribution(text, _flag(name), low=low)

    lengths = {name: length(name) for name in ("prompt_len", "output_len", "prefix_len", "turns")}
    found = {**lengths, "think": length("think", 0.0)}
    turns = found["turns"]
    if found["think"] is not None and (turns is None or turns == _1):
        raise ConfigError("--think is the time between turns; give --turns 2 or more.")
    if args.dataset is not None and turns is not None and not turns.is_constant:
        raise ConfigError("With --dataset, --turns is a number: the most turns to take of a conversation.")
    plain = {"num_requests", "rate", "burstiness", "seed", "prefix_skew", "speed"}
    values = {name: value for name in plain if (value := getattr(args, name)) is not None}
    values |= {name: value for name, value in found.items() if value is not None}
    num_prefixes = args.prefixes or (1 if args.prefix_len is not None else 0)
    return Traffic(
        arrivals=arrivals,
        num_prefixes=num_prefixes,
        dataset=args.dataset,
        tokenizer=args.tokenizer,
        trace=args.trace,
        **values,
    )


def _fill(count: int, turns: Distribution, random: np.random.Generator) -> list[int]:
    """Sizes of conversations that add up to `count`."""
    sizes: list[int] = []
    left = count
    for size in turns.draw_counts(count, random):
        if left <= 0:
            break
        sizes.append(min(size, left))
        left -= sizes[-1]
    return sizes


def _refuse(names: set[str], why: str) -> None:
    if names:
        flags = ", ".join(map(_flag, sorted(names)))
        raise ConfigError(f"Leave out {flags}: {why}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
