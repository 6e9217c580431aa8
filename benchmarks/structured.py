"""What structured output costs: decoding 16 requests at once with a grammar, against the same without.

Runs take turns within one process, so that whatever else the machine does falls on all kinds alike. All
generate the same number of tokens at temperature 1: "free" with no grammar; "text" under an expression that
forces nothing, so that every token needs its mask; "schema" under a JSON schema, whose forced tokens need no
step of their own; "bounded" under one with short maxLengths, near which masks take longest.

    python benchmarks/structured.py
    python benchmarks/structured.py --rounds 9 --requests 1 4 16
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

from gqa_serve import LLM, SamplingParams
from gqa_serve.config import engine_environment
from gqa_serve.engine.grammars import json_schema_grammar, regex_grammar


def people(**string: int) -> str:
    """The grammar of a long list."""
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", **string},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "interests": {"type": "array", "items": {"type": "string", **string}, "maxItems": 3},
        },
        "required": ["name", "age", "interests"],
        "additionalProperties": False,
    }
    return json_schema_grammar({"type": "array", "items": person, "minItems": 1000})


GRAMMARS = {
    "free": None,
    "text": regex_grammar(r"(?s:[\x20-\x7e\n]*)"),
    "schema": people(),
    "bounded": people(maxLength=12),
}


def run(llm: LLM, grammar: str | None, requests: int, tokens: int) -> float:
    """Tokens per second of decoding."""
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=tokens, ignore_eos=True, grammar=grammar)
        for seed in range(requests)
    ]
    begin = time.perf_counter()
    outputs = llm.generate(["A list of people:\n"] * requests, params)
    seconds = time.perf_counter() - begin
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert count == requests * tokens, "a request ended early"
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", nargs="+", type=int, default=[16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    environ = engine_environment()
    if environ != dict(os.environ):  # OpenMP reads it when it is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], environ)
    llm = LLM(args.model, progress=False)
    for requests in args.requests:
        rates: dict[str, list[float]] = {name: [] for name in GRAMMARS}
        for grammar in GRAMMARS.values():
            run(llm, grammar, requests, 8)  # compiles it
        for _ in range(args.rounds):
            for name, grammar in GRAMMARS.items():
                rates[name].append(run(llm, grammar, requests, args.tokens))
        free = statistics.median(rates["free"])
        for name, values in rates.items():
            ratios = [value / other for value, other in zip(values, rates["free"], strict=True)]
            print(
                f"{requests:3} requests  {name:7}  {statistics.median(values):7.1f} tokens/s "
                f"({min(values):.1f}..{max(values):.1f})  {statistics.median(values) / free:6.1%} of free "
                f"(rounds: {min(ratios):.1%}..{max(ratios):.1%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
