"""Perplexity of one model with weights and KV cache in several formats: what each costs in quality.

The text is cut into windows of 512 tokens (each begun as the tokenizer begins a text), of which 40 that lie
evenly over the text are scored, each by itself. Perplexity is exp of the mean negative log-probability of all
tokens that something precedes. The ratio to the first row is what to quote: the number itself depends on the
text.

The default text is this repository's documents and the docstrings of a list of standard library modules, in a
fixed order: the same for one checkout and one version of Python. Give --text for one of your own.

    .venv/bin/python benchmarks/perplexity.py --model demo --quantization none int8 int4
    .venv/bin/python benchmarks/perplexity.py --backend reference --quantization none \
        --kv-cache-dtype float32 bfloat16 int8 fp8
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gqa_serve.config import EngineConfig
from gqa_serve.engine.core import Engine
from gqa_serve.engine.memory import format_bytes
from gqa_serve.engine.model_runner import ModelRunner
from gqa_serve.engine.request import EngineRequest, ModelInfo, SamplingParams
from gqa_serve.engine.tokenizer import load_tokenizer
from gqa_serve.engine.weights.hub import resolve_model
from gqa_serve.errors import GqaServeError
from gqa_serve.progress import ProgressBar

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/api.md",
    "docs/models.md",
    "LICENSE",
)
MODULES = (
    "argparse", "calendar", "collections", "contextlib", "copy", "csv", "datetime", "decimal", "difflib",
    "doctest", "enum", "fractions", "functools", "heapq", "inspect", "ipaddress", "json", "logging",
    "mailbox", "optparse", "pathlib", "pickle", "random", "shutil", "smtplib", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "turtle", "typing",
    "unittest.mock", "zipfile",
)  # fmt: skip


def default_text() -> str:
    """The documents of this repository, then docstrings, in the order of the lists above."""
    parts = [(REPOSITORY / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    for module in MODULES:
        parts += docstrings(module)
    return "\n\n".join(parts)


def docstrings(module: str) -> Iterator[str]:
    """Those of a module, its classes and functions that say more than one line."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"This Python has no source of {module}; give a --text.")
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text is not None and "\n" in text:
                yield text


def cut(tokens: list[int], beginning: list[int], window: int) -> list[list[int]]:
    """Windows of `window` tokens, each starting with `beginning`; a last, shorter one is left out."""
    size = window - len(beginning)
    starts = range(0, len(tokens) - size + 1, size)
    return [beginning + tokens[start : start + size] for start in starts]


def spread(windows: list[list[int]], count: int) -> list[list[int]]:
    """At most `count` of the windows, evenly spaced."""
    count = min(count, len(windows))
    return [windows[index * len(windows) // count] for index in range(count)]


def score(engine: Engine, windows: list[list[int]], label: str) -> tuple[float, int]:
    """(sum of log-probabilities, number of tokens) over all windows."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0)
    bar = ProgressBar(label)
    for index, window in enumerate(windows):
        engine.add(EngineRequest(request_id=str(index), prompt=window, params=params))
    total, count, done = 0.0, 0, 0
    try:
        while engine.has_work:
            for output in engine.step():
                if output.error is not None or output.prompt_logprobs is None:
                    raise SystemExit(f"A window could not be scored: {output.error}")
                scored = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
                total, count, done = total + math.fsum(scored), count + len(scored), done + 1
                bar.update(done, len(windows))
    finally:
        bar.close()
    return total, count


def measure(
    path: Path, config: EngineConfig, windows: list[list[int]]
) -> tuple[ModelInfo, float, int, float]:
    """(what was loaded, perplexity, tokens scored, seconds of scoring) in one pair of formats."""
    bar = ProgressBar("Loading weights")
    try:
        engine = Engine(ModelRunner(path, config, bar.update), config)
    finally:
        bar.close()
    start = time.perf_counter()
    total, count = score(engine, windows, f"Scoring in {config.quantization}")
    return engine.info, math.exp(-total / count), count, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8; default: see above")
    parser.add_argument("--windows", type=int, default=40, help="most windows to score (40)")
    parser.add_argument("--window", type=int, default=512, help="tokens per window (512)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"])
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    path = resolve_model(args.model)
    tokenizer = load_tokenizer(path)
    text = default_text() if args.text is None else args.text.read_text(encoding="utf-8")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    windows = spread(cut(tokens, tokenizer.encode(""), args.window), args.windows)
    if not windows:
        raise SystemExit(f"The text has {len(tokens)} tokens, fewer than one window of {args.window}.")
    print(f"{args.model}: {len(windows)} windows of {args.window} tokens", flush=True)
    columns = f"{'size':>11}{'KV':>10}{'perplexity':>12}{'ratio':>9}{'tokens/s':>10}"
    print(f"{'quantization':<14}{'held as':<20}{columns}")
    first = None
    for quantization, kv_cache_dtype in itertools.product(args.quantization, args.kv_cache_dtype):
        config = EngineConfig(
            model=args.model,
            quantization=quantization,
            backend=args.backend,
            dtype=args.dtype,
            kv_cache_dtype=kv_cache_dtype,
            threads=args.threads,
            max_model_len=args.window,
            max_num_seqs=16,
            prefix_caching=False,
        )
        info, perplexity, count, seconds = measure(path, config, windows)
        first = first or perplexity
        held = info.dtype if info.quantization == "none" else info.quantization
        print(
            f"{quantization:<14}{held:<20}{format_bytes(info.weight_bytes):>11}{info.kv_dtype:>10}"
            f"{perplexity:>12.4f}{perplexity / first:>9.4f}{count / seconds:>10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except GqaServeError as error:
        sys.exit(f"error: {error}")
