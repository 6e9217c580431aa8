"""`gqa-serve convert`: the flags, and the order of the work: check all, measure, write, report.

Owns the command line. Does not know how heads are merged. Invariant: what can be refused is refused before
the first tensor is read, and no flag is accepted and then not used.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gqa_serve.command_line import make_parser
from gqa_serve.errors import ConfigError
from gqa_serve.progress import ProgressBar
from gqa_serve.workbench.report import Report, add_output_flags, check_output_flags

if TYPE_CHECKING:
    from gqa_serve.workbench.convert.forward import CalibrationText, Variant
    from gqa_serve.workbench.convert.methods import Method
    from gqa_serve.workbench.convert.source import Source

_METHODS = ("mean", "first", "random", "grouped", "fitted")
_DTYPES = ("float32", "bfloat16", "float16")
_WINDOW, _TOKENS = 256, 4096

_EPILOG = """
  gqa-serve convert --model demo --num-kv-heads 1                        MQA by mean-pooling, into ./demo-kv1
  gqa-serve convert --model demo --num-kv-heads 1 --compare              all methods side by side
  gqa-serve convert --model ./mha --num-kv-heads 8 --method fitted --calibration book.txt --output ./gqa
  gqa-serve convert --model ./gqa --num-kv-heads 32 --output ./mha       more heads, by repetition: exact
"""


def run(words: list[str]) -> None:
    """Parse, check, convert, report. Raises GqaServeError."""
    args = _parser().parse(words)
    check_output_flags(args)
    _check_flags(args)
    output = None if args.compare and args.output is None else args.output or _default_output(args)
    if output is not None:
        from gqa_serve.engine.weights.safetensors_writer import require_free

        require_free(output)
    from gqa_serve.workbench.convert.heads import check_counts
    from gqa_serve.workbench.convert.source import open_source

    source = open_source(args.model, revision=args.revision, offline=args.offline)
    config = source.config
    check_counts(config.num_heads, config.num_kv_heads, args.num_kv_heads)
    expands = args.num_kv_heads > config.num_kv_heads
    if expands and (args.method is not None or args.compare):
        raise ConfigError(
            f"{args.num_kv_heads} KV heads out of {config.num_kv_heads} are made by repeating them, which "
            "is exact: leave out --method and --compare."
        )
    title = f"{args.model}: {config.num_kv_heads} -> {args.num_kv_heads} KV heads"
    report = Report("convert", title, "gqa-serve convert " + shlex.join(words))
    variants, text = _measure(args, source) if _measures(args, expands) else ([], None)
    if text is not None:
        from gqa_serve.workbench.convert.show import measured_data, measured_sections

        report.sections += measured_sections(variants, text, config, args.num_kv_heads)
        report.data |= measured_data(variants, text)
    if output is not None:
        _write(args, source, output, variants, report)
    report.deliver(args)


def _measures(args: argparse.Namespace, expands: bool) -> bool:
    return args.measure and not expands


def _check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for flags that have nothing to act on."""
    if args.num_kv_heads < 1:
        raise ConfigError("--num-kv-heads must be 1 (MQA) or more.")
    if not args.measure and (args.compare or args.method in ("grouped", "fitted")):
        what = "--compare" if args.compare else f"--method {args.method}"
        raise ConfigError(f"{what} needs the model's activations; leave out --no-measure.")
    if not args.measure and (args.calibration or args.window or args.calibration_tokens):
        raise ConfigError("--calibration, --calibration-tokens and --window are not used with --no-measure.")
    if not args.measure and args.html is not None:
        raise ConfigError("--html shows what was measured; leave out --no-measure.")
    if args.seed is not None and args.method != "random" and not args.compare:
        raise ConfigError("--seed is for --method random or --compare; leave it out.")
    if args.window is not None and args.window < 8:
        raise ConfigError("--window must be 8 tokens or more.")
    if args.compare and args.output is None and (args.method or args.dtype):
        raise ConfigError("--compare without --output writes nothing: leave out --method and --dtype.")
    for flag, value in (
        ("--calibration-tokens", args.calibration_tokens),
        ("--max-shard-gb", args.max_shard_gb),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{flag} must be more than 0.")


def _default_output(args: argparse.Namespace) -> Path:
    """./NAME-kvN: the model's own name without its folder or suffix."""
    name = Path(args.model).expanduser().name.removesuffix(".gguf") or "model"
    return Path(f"{name}-kv{args.num_kv_heads}")


def _measure(args: argparse.Namespace, source: Source) -> tuple[list[Variant], CalibrationText]:
    from gqa_serve.engine.tokenizer import load_tokenizer
    from gqa_serve.workbench.convert.forward import measure
    from gqa_serve.workbench.convert.text import read_text

    window = min(args.window or _WINDOW, source.config.max_model_len)
    tokenizer = load_tokenizer(source.path)
    text = read_text(args.calibration, tokenizer, window, args.calibration_tokens or _TOKENS)
    if tokenizer.vocab_size > source.config.vocab_size and int(text.tokens.max()) >= source.config.vocab_size:
        raise ConfigError(f"The tokenizer of {source.name} has more tokens than the model; check its files.")
    methods = cast("tuple[Method, ...]", _METHODS if args.compare else (args.method or "mean",))
    with contextlib.closing(ProgressBar("Measuring layers")) as bar:
        variants = measure(
            source,
            args.num_kv_heads,
            methods,
            text,
            args.seed or 0,
            lambda layer: bar.update(layer + 1, source.config.num_layers),
        )
    return variants, text


def _write(
    args: argparse.Namespace, source: Source, output: Path, variants: list[Variant], report: Report
) -> None:
    from gqa_serve.workbench.convert.methods import plan_layer
    from gqa_serve.workbench.convert.output import describe, write_checkpoint
    from gqa_serve.workbench.convert.show import groups_paragraph

    method = cast("Method", args.method or "mean")
    chosen = next((variant for variant in variants if variant.method == method), None)
    if chosen is not None:
        merges = chosen.merges
    else:
        layers = range(source.config.num_layers)
        merges = [
            plan_layer(method, source.config, layer, args.num_kv_heads, None, args.seed or 0)
            for layer in layers
        ]
    shown = "repeat" if merges[0].expands else method
    note = describe(source, shown, merges, args.seed or 0 if method == "random" else None)
    note |= report.data
    with contextlib.closing(ProgressBar("Writing tensors")) as bar:
        num_bytes = write_checkpoint(
            source,
            output,
            merges,
            note,
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            on_tensor=bar.update,
        )
    if chosen is not None and method in ("grouped", "fitted"):
        groups_paragraph(report, chosen)
    report.sections.append(
        f"Wrote {output}: {num_bytes / 1e9:.3f} GB of weights, method {shown}. Next: gqa-serve uptrain "
        f"--model {output}, or gqa-serve --model {output} to serve it."
    )
    report.data |= {"output": str(output), "weight_bytes": num_bytes, "method": shown}


def _parser() -> Any:
    parser = make_parser(
        "gqa-serve convert",
        "The same model with another number of KV heads: MHA to GQA to MQA, as a new checkpoint.\n"
        "Fewer KV heads mean a smaller KV cache and faster decoding; quality drops until it is uptrained.",
        usage="gqa-serve convert --model MODEL --num-kv-heads N [--output DIR] [options]",
        epilog="examples:" + _EPILOG,
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="hub id, directory, .gguf file or 'demo'")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    group.add_argument("--offline", action="store_true", help="use what the hub cache holds")
    group.add_argument(
        "--num-kv-heads", required=True, type=int, metavar="N", help="KV heads of the new model; 1 is MQA"
    )
    group = parser.add_argument_group("result")
    group.add_argument("--output", type=Path, metavar="DIR", help="new directory (default: ./MODEL-kvN)")
    group.add_argument("--dtype", choices=_DTYPES, help="of the new weights (default: as they are stored)")
    group.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file (default: 5)"
    )
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=_METHODS,
        help="mean (default): pool neighbouring heads, as Ainslie et al. 2023; first, random: their "
        "comparisons; grouped: pool the heads that do alike; fitted: those, by least squares",
    )
    group.add_argument("--seed", type=int, help="of --method random (default: 0)")
    group.add_argument("--compare", action="store_true", help="measure every method, side by side")
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text like what the model will see (default: ours)",
    )
    group.add_argument(
        "--calibration-tokens", type=int, metavar="N", help=f"at most so many of it (default: {_TOKENS})"
    )
    group.add_argument("--window", type=int, metavar="N", help=f"tokens of one text (default: {_WINDOW})")
    group.add_argument(
        "--no-measure", dest="measure", action="store_false", help="convert only: reads the weights once"
    )
    add_output_flags(parser)
    return parser
