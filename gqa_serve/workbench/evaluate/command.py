"""`gqa-serve eval`: the flags, the checks before the work, and where its results go.

Owns the command line. Imports torch only once everything that was typed makes sense. Invariant: no flag is
accepted and then not used.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_serve.command_line import make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.settings import add_flags, parse_size
from gqa_serve.workbench.evaluate import candidates as choice
from gqa_serve.workbench.report import Report, add_output_flags, check_output_flags

if TYPE_CHECKING:
    from gqa_serve.workbench.evaluate.results import CandidateResult
    from gqa_serve.workbench.evaluate.run import Work

TESTS = ("text", "passkey", "needle", "speed")
_LENGTHS, _DEPTHS, _WINDOW, _CONTEXT = (256, 512), (0.0, 0.5, 1.0), 1024, 2048

_EPILOG = """
  gqa-serve eval --model demo                                     a short look at one model, in about a minute
  gqa-serve eval --model demo --kv-cache-dtype bfloat16,int8      what an int8 KV cache costs
  gqa-serve eval --model ./mha --model ./gqa-4 --model ./mqa --text book.txt --html report.html
                                                                  checkpoints against the first of them
  gqa-serve eval --model ./mine --tests passkey,needle --lengths 1024,4096,16384 --depths 0,0.25,0.5,0.75,1
  gqa-serve eval --candidate full:model=./mine --candidate small:model=./mine,quantization=int4 \\
      --text *.txt --json eval.json --resume                      again after it was stopped
"""


def run(words: list[str]) -> None:
    """Parse, check, evaluate, report. Raises GqaServeError."""
    parser = _parser()
    args = parser.parse(words)
    check_output_flags(args)
    if args.resume and args.json is None:
        raise ConfigError("--resume takes up the results in the file of --json; give that too.")
    flags = {name: getattr(args, name) for name in choice.SETTINGS if name != "model" and hasattr(args, name)}
    tests = _tests(args)
    _refuse_unused(args, tests)
    named = choice.expand(args.model, flags, args.candidate, args.config)
    reference_name = args.reference or named[0][0]
    if reference_name not in [name for name, _ in named]:
        names = ", ".join(name for name, _ in named)
        raise ConfigError(f"--reference {reference_name} names no candidate; there are: {names}.")
    _evaluate(args, tests, named, reference_name, "gqa-serve eval " + shlex.join(words))


def _evaluate(
    args: argparse.Namespace,
    tests: list[str],
    named: list[tuple[str, Any]],
    reference_name: str,
    command: str,
) -> None:
    from gqa_serve.logs import configure_logging
    from gqa_serve.workbench.evaluate.compare import judge
    from gqa_serve.workbench.evaluate.results import load_results
    from gqa_serve.workbench.evaluate.run import Evaluation
    from gqa_serve.workbench.evaluate.show import roofline_table, sections
    from gqa_serve.workbench.evaluate.show_retrieval import grid_cells

    configure_logging("warning")
    found = choice.find(named)
    reference = next(candidate for candidate in found if candidate.name == reference_name)
    work = _work(args, tests, found)
    bounds = _bounds(args, found, work)
    known = load_results(args.json) if args.resume else {}
    report = Report("eval", f"Evaluation: {', '.join(candidate.name for candidate in found)}", command)

    def keep(result: CandidateResult) -> None:
        known[result.key] = result
        if args.json is not None:
            report.data = _data(list(known.values()))
            report.write_json(args.json)

    results = Evaluation(found, reference, work, dict(known), keep).run()
    margin = math.log1p(args.margin / 100)
    judged = judge(results, work.context, work.requests, margin)
    report.sections = sections(judged, work, margin)
    if bounds:
        report.sections.append(roofline_table(args.hardware, [r.name for r in results], bounds, work))
    report.data = {**_data(results), "cells": grid_cells(results, work)}
    report.deliver(args)


def _bounds(
    args: argparse.Namespace, found: Sequence[choice.Candidate], work: Work
) -> dict[str, float | str]:
    """Decode tokens/s that --hardware allows each candidate, before anything is measured here."""
    if args.hardware is None:
        return {}
    from gqa_serve.workbench.evaluate.roofline import roofline_tokens_per_s
    from gqa_serve.workbench.hardware import find_hardware

    hardware = find_hardware(args.hardware)
    return {
        candidate.name: roofline_tokens_per_s(candidate, hardware, work.context, work.requests)
        for candidate in found
    }


def _data(results: Sequence[CandidateResult]) -> dict[str, Any]:
    import msgspec

    from gqa_serve.workbench.evaluate.results import SCHEMA

    return {"schema": SCHEMA, "candidates": [msgspec.to_builtins(result) for result in results]}


def _parser() -> Any:
    parser = make_parser(
        "gqa-serve eval",
        "What a checkpoint or a setting costs in quality and what it saves: perplexity, retrieval from\n"
        "long contexts, agreement with a reference, memory, speed, side by side, with confidence intervals.",
        usage="gqa-serve eval --model MODEL [--model MODEL ...] [options]",
        epilog="examples:" + _EPILOG,
    )
    group = parser.add_argument_group("candidates")
    group.add_argument(
        "--model",
        action="append",
        default=[],
        help="hub id, directory, .gguf file or 'demo'; may be repeated",
    )
    group.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="one more, with settings of its own (those of the flags below); may be repeated",
    )
    group.add_argument(
        "--reference", metavar="NAME", help="the candidate others are compared with (the first)"
    )
    group = parser.add_argument_group("tests")
    group.add_argument("--tests", default=None, help=f"of {', '.join(TESTS)} (text,passkey,speed)")
    group.add_argument(
        "--no-agreement", action="store_true", help="no KL and top-1: half the time for a text"
    )
    group.add_argument(
        "--margin", type=float, default=1.0, metavar="PERCENT", help="of perplexity, that does not matter (1)"
    )
    _add_text_flags(parser)
    _add_retrieval_flags(parser)
    group = parser.add_argument_group("memory and speed")
    group.add_argument("--context", type=int, metavar="N", help=f"tokens of each request ({_CONTEXT})")
    group.add_argument("--requests", type=int, metavar="N", default=4, help="requests at once (4)")
    group.add_argument(
        "--hardware", metavar="NAME", help="what decoding would take there too: h100, a100, ..."
    )
    group.add_argument("--prefill-tokens", type=int, metavar="N", help="tokens of a timed prompt (256)")
    add_flags(parser, choice.settings_class())
    add_output_flags(parser)
    parser.add_argument("--resume", action="store_true", help="keep what the file of --json holds already")
    return parser


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="UTF-8, each a document; default: a built-in text",
    )
    group.add_argument("--max-text", metavar="SIZE", help="of longer texts, pieces spread evenly (256KiB)")
    group.add_argument("--window", type=int, metavar="N", help=f"tokens that are seen at once ({_WINDOW})")
    group.add_argument(
        "--stride", type=int, metavar="N", help="tokens from a window to the next (half of it)"
    )


def _add_retrieval_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("retrieval")
    group.add_argument("--lengths", metavar="N,N,...", help="prompt lengths in tokens (256,512)")
    group.add_argument("--depths", metavar="X,X,...", help="where the fact is: 0 first, 1 last (0,0.5,1)")
    group.add_argument("--samples", type=int, metavar="N", help="prompts of each length and depth (4)")
    group.add_argument(
        "--haystack", type=Path, metavar="FILE", help="text to hide facts in; default: built in"
    )
    group.add_argument("--needle", metavar="SENTENCE", help="a fact of your own; with the next two")
    group.add_argument("--needle-question", metavar="TEXT", help="what comes last; ends before the answer")
    group.add_argument(
        "--needle-answer", metavar="TEXT", help="what must be in the answer and is in --needle"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of keys and fillers (0)")


def _tests(args: argparse.Namespace) -> list[str]:
    tests = [name.strip() for name in (args.tests or "text,passkey,speed").split(",")]
    for name in tests:
        if name not in TESTS:
            raise ConfigError(f"--tests {name}: there is no such test; choose of {', '.join(TESTS)}.")
    if args.needle is not None and "needle" not in tests:
        tests += ["needle"] if args.tests is None else []
    return list(dict.fromkeys(tests))


def _refuse_unused(args: argparse.Namespace, tests: Sequence[str]) -> None:
    """Raise ConfigError for a flag of a test that is not run, and for values out of range."""
    own = {
        "text": ("text", "max_text", "window", "stride"),
        "passkey or needle": ("lengths", "depths", "samples", "haystack", "seed"),
        "needle": ("needle", "needle_question", "needle_answer"),
        "speed": ("prefill_tokens",),
    }
    for test, names in own.items():
        given = [name for name in names if getattr(args, name) is not None]
        if given and not any(part in tests for part in test.split(" or ")):
            flag = "--" + given[0].replace("_", "-")
            raise ConfigError(f"{flag} is for the {test} test, which --tests leaves out.")
    if args.no_agreement and "text" not in tests:
        raise ConfigError("--no-agreement is for the text test, which --tests leaves out.")
    needle = [args.needle, args.needle_question, args.needle_answer]
    if any(part is not None for part in needle) and not all(needle):
        raise ConfigError("--needle, --needle-question and --needle-answer go together; give all three.")
    for name in ("window", "stride", "samples", "context", "requests", "prefill_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    if not 0 < args.margin <= 100:
        raise ConfigError(f"--margin must be above 0 and at most 100 percent; got {args.margin:g}.")


def _work(args: argparse.Namespace, tests: list[str], found: Sequence[choice.Candidate]) -> Work:
    """What to measure. Raises ConfigError for lengths beyond a candidate's context."""
    from gqa_serve.workbench.evaluate.retrieval import Needle, check_needle
    from gqa_serve.workbench.evaluate.run import Work
    from gqa_serve.workbench.evaluate.text import read_corpus

    smallest = min(found, key=lambda candidate: candidate.model.max_model_len)
    limit = smallest.model.max_model_len
    window = _fitting("--window", args.window, _WINDOW, limit, smallest.name)
    needle = None
    if args.needle is not None:
        needle = Needle(args.needle, args.needle_question, args.needle_answer)
        check_needle(needle)
    haystack = None
    if args.haystack is not None:
        haystack = "\n\n".join(
            document.text for document in read_corpus([args.haystack], 2**40, "--haystack").documents
        )
    work = Work(
        tests=tests,
        corpus=read_corpus(args.text or [], parse_size(args.max_text or "256KiB")),
        window=window,
        stride=args.stride if args.stride is not None else max(1, window // 2),
        agreement=not args.no_agreement,
        lengths=_lengths(args.lengths) if args.lengths else [n for n in _LENGTHS if n + 64 <= limit],
        depths=_depths(args.depths) if args.depths else list(_DEPTHS),
        samples=args.samples or 4,
        haystack=haystack,
        needle=needle,
        seed=args.seed or 0,
        context=_fitting("--context", args.context, _CONTEXT, limit, smallest.name),
        requests=args.requests,
        prefill_tokens=_fitting("--prefill-tokens", args.prefill_tokens, 256, limit, smallest.name),
    )
    if work.tasks and not work.lengths:
        raise ConfigError(f"{smallest.name} has a context of {limit} tokens; give shorter --lengths.")
    if work.tasks and max(work.lengths) + work.answer_room > limit:
        raise ConfigError(
            f"--lengths {max(work.lengths)}: {smallest.name} has a context of {limit} tokens, of which "
            f"{work.answer_room} are left for the answer; give at most {limit - work.answer_room}."
        )
    return work


def _fitting(flag: str, asked: int | None, default: int, limit: int, name: str) -> int:
    """What was asked for if it fits the smallest context, else an error; the default cut to fit."""
    if asked is None:
        return min(default, limit)
    if asked > limit:
        raise ConfigError(f"{flag} {asked}: {name} has a context of {limit} tokens; give at most that.")
    return asked


def _lengths(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--lengths {text}: write whole numbers with commas, e.g. 512,1024,2048."
        ) from error
    if min(values) < 1:
        raise ConfigError(f"--lengths {text}: a length is at least 1.")
    return sorted(set(values))


def _depths(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--depths {text}: write numbers with commas, e.g. 0,0.25,0.5.") from error
    if not all(0 <= value <= 1 for value in values):
        raise ConfigError(f"--depths {text}: a depth is between 0, the beginning, and 1, the end.")
    return sorted(set(values))
