"""What grouping costs and uptraining gives back, on a model small enough to train here: the demo series.

A multi-head model is trained from scratch on local text, converted to 4, 2 and 1 KV heads, and each of these
is uptrained with several seeds: the experiment of Ainslie et al. 2023 (arXiv 2305.13245), figure 5, in half
an hour on two cores instead of days on a pod. Everything is done by the commands a user has
(`gqa-serve uptrain`, `convert`); a row at the top trains the unconverted model on for as long, because some
of what uptraining gains is only more training.

The text is this repository's documents and the docstrings and sources of a list of standard library modules,
which every Python has, and passages that hide a pass key, so that `gqa-serve eval --tests passkey` has
something to find. It is the same for one checkout and one version of Python. One document in 20 is held out.

    .venv/bin/python benchmarks/demo_series.py --output demo-series            about half an hour
    .venv/bin/python benchmarks/demo_series.py --output demo-quick --quick     2 or 3

Run again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perplexity import MODULES, REPOSITORY, docstrings
from rich.console import Console

from gqa_serve.workbench.evaluate.retrieval import Haystack
from gqa_serve.workbench.report import (
    Cell,
    Column,
    Report,
    Table,
    add_output_flags,
    check_output_flags,
    number,
)

ALPHA = 0.05
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class Size:
    """Of a series. Tokens are those of pretraining; uptraining takes ALPHA of them."""

    hidden_size: int
    num_layers: int
    seq_len: int
    tokens: int
    vocab_size: int
    num_passages: int
    passage_chars: tuple[int, int]
    seeds: tuple[int, ...]
    num_heads: int = 8
    learning_rate: float = 2e-3
    uptrain_rate: float = 5e-4

    def config(self) -> dict[str, Any]:
        """config.json of the model, but for what its tokenizer decides."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": 2 * self.seq_len,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }


FULL = Size(256, 4, 512, 3_000_000, 1024, 3000, (300, 1400), (1, 2, 3))
QUICK = Size(128, 2, 256, 500_000, 512, 1500, (300, 600), (1, 2))


# --- the text ----------------------------------------------------------------------------------------------


class Characters:
    """A tokenizer whose tokens are characters: makes the passages of `gqa-serve eval` as text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


def prose() -> Iterator[str]:
    """Documents, docstrings, and sources of the standard library by pieces of about 8000 characters."""
    for file in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))):
        yield file.read_text(encoding="utf-8")
    for module in MODULES:
        yield "\n\n".join(docstrings(module))
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise SystemExit(f"This Python has no source of {module}.")
        lines = Path(spec.origin).read_text(encoding="utf-8").splitlines(keepends=True)
        for begin in range(0, len(lines), 200):
            yield "".join(lines[begin : begin + 200])


def passages(size: Size) -> Iterator[str]:
    """Texts with a pass key and the question for it, answered."""
    haystack = Haystack(Characters(), None, None, seed=20)  # type: ignore[arg-type]
    draw = random.Random(20)
    for index in range(size.num_passages):
        prompt = haystack.prompt("passkey", draw.randint(*size.passage_chars), draw.random(), index)
        yield "".join(map(chr, prompt.token_ids)) + f" {prompt.key}.\n"


def write_text(folder: Path, size: Size) -> None:
    """train.jsonl and held_out.jsonl, each document a line, in `folder`."""
    if (folder / "held_out.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text for text in (*prose(), *passages(size)) if text.strip()]
    for name, held_out in (("train", False), ("held_out", True)):
        chosen = [text for i, text in enumerate(texts) if (i % HELD_OUT_EVERY == 0) == held_out]
        partial = folder / f"{name}.partial"
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
        partial.replace(folder / f"{name}.jsonl")


# --- the runs ----------------------------------------------------------------------------------------------


class Series:
    """The models of one series, in folders of `root`."""

    def __init__(self, root: Path, size: Size, threads: int | None) -> None:
        self.root = root
        self.size = size
        self.threads = threads
        self.text = root / "text"

    def original(self) -> dict[str, Any]:
        """Train the multi-head model; the numbers of its report."""
        config = self.root / "config.json"
        config.write_text(json.dumps(self.size.config(), indent=1), encoding="utf-8")
        words = ["--from-config", str(config), "--train-tokenizer", str(self.size.vocab_size)]
        words += ["--learning-rate", str(self.size.learning_rate), "--tokens", str(self.size.tokens)]
        return self._uptrain("original", words)

    def converted(self, num_kv_heads: int) -> Path:
        """The original with its K and V heads averaged in groups; the original itself for all heads."""
        if num_kv_heads == self.size.num_heads:
            return self.root / "original"
        folder = self.root / f"kv{num_kv_heads}"
        if not (folder / "config.json").exists():
            words = ["--model", str(self.root / "original"), "--num-kv-heads", str(num_kv_heads)]
            call("convert", *words, "--output", str(folder))
        return folder

    def uptrained(self, num_kv_heads: int, seed: int) -> dict[str, Any]:
        """Uptrain a converted model; the numbers of its report."""
        words = ["--model", str(self.converted(num_kv_heads)), "--seed", str(seed)]
        words += ["--learning-rate", str(self.size.uptrain_rate)]
        words += ["--original-tokens", str(self.size.tokens), "--alpha", str(ALPHA)]
        return self._uptrain(f"kv{num_kv_heads}-up-seed{seed}", words)

    def _uptrain(self, name: str, words: list[str]) -> dict[str, Any]:
        report = self.root / f"{name}.json"
        if not report.exists():
            words += ["--text", str(self.text / "train.jsonl")]
            words += ["--validation-text", str(self.text / "held_out.jsonl")]
            words += ["--seq-len", str(self.size.seq_len), "--output", str(self.root / name)]
            words += [] if self.threads is None else ["--threads", str(self.threads)]
            call("uptrain", *words, "--json", str(report))
        numbers: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return numbers


def call(*words: str) -> None:
    """Run a command of gqa-serve, showing it."""
    print(f"$ gqa-serve {shlex.join(words)}", flush=True)
    code = subprocess.run(
        [sys.executable, "-m", "gqa_serve.cli", *words], stdout=subprocess.DEVNULL
    ).returncode
    if code:
        raise SystemExit(f"gqa-serve {words[0]} ended with status {code}.")


# --- the table ---------------------------------------------------------------------------------------------


def row(series: Series, num_kv_heads: int, original_loss: float) -> dict[str, Cell]:
    """Losses of one group count, over the seeds."""
    size = series.size
    runs = [series.uptrained(num_kv_heads, seed) for seed in size.seeds]
    after = [float(run["validation_loss"]) for run in runs]
    before = float(runs[0]["loss_before"])
    return {
        "num_kv_heads": num_kv_heads,
        "kv_bytes": 2
        * 2
        * series.size.num_layers
        * num_kv_heads
        * series.size.hidden_size
        // series.size.num_heads,
        "before": before,
        "after": statistics.mean(after),
        "deviation": statistics.stdev(after) if len(after) > 1 else None,
        "gap_before": round(before - original_loss, 5) + 0.0,  # + 0.0: nothing is not minus nothing
        "gap_after": statistics.mean(after) - original_loss,
        "perplexity": math.exp(statistics.mean(after)),
    }


COLUMNS = [
    Column("num_kv_heads", "KV heads"),
    Column("kv_bytes", "KV bytes/token (bf16)", number(0)),
    Column("before", "loss converted", number(4)),
    Column("after", "loss uptrained", number(4)),
    Column("deviation", "+- over seeds", number(4)),
    Column("gap_before", "gap converted", number(4)),
    Column("gap_after", "gap uptrained", number(4)),
    Column("gap_control", "gap uptrained, to the control", number(4)),
    Column("perplexity", "perplexity uptrained", number(2)),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo-series"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="a smaller model, less text, fewer seeds")
    parser.add_argument("--threads", type=int)
    add_output_flags(parser)
    args = parser.parse_args()
    check_output_flags(args)
    began = time.monotonic()
    size = QUICK if args.quick else FULL
    args.output.mkdir(parents=True, exist_ok=True)
    series = Series(args.output, size, args.threads)
    write_text(series.text, size)
    original = series.original()
    loss = float(original["validation_loss"])
    counts = [size.num_heads >> shift for shift in range(size.num_heads.bit_length())]
    rows = [row(series, count, loss) for count in counts]
    for line in rows:
        line["gap_control"] = float(line["after"] or 0.0) - float(rows[0]["after"] or 0.0)
    report = Report("demo series", "What grouping costs, and uptraining gives back", shlex.join(sys.argv))
    note = (
        f"Losses in nats/token over {original['held_out_tokens']:,} held-out tokens; the original's is "
        f"{loss:.4f} after {size.tokens:,} tokens, and a gap is the distance to it. Uptrained for {ALPHA:g} "
        f"of that, {len(size.seeds)} seeds each; {size.num_heads} KV heads: the original, trained on too, "
        "as long: the control."
    )
    report.sections.append(Table("The demo series", COLUMNS, rows, note=note))
    report.data = {"original_loss": loss, "seconds": time.monotonic() - began}
    report.print(Console(width=max(120, Console().width)))
    if args.json is not None:
        report.write_json(args.json)
    if args.html is not None:
        report.write_html(args.html)


if __name__ == "__main__":
    main()
