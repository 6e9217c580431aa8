"""The `gqa-serve` command: parse, call, print errors as one sentence. Imports nothing heavy itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from gqa_serve import __version__
from gqa_serve.config import EngineConfig, ServerConfig, add_flags, collect
from gqa_serve.errors import ConfigError, GqaServeError

_EPILOG = """commands: serve (default), chat; `gqa-serve COMMAND --help` has the details.
Every setting can also be GQA_SERVE_NAME in the environment or a `name: value` line in --config FILE.

  gqa-serve --model demo                         a small model to try, if its weights are installed
  gqa-serve --model Qwen/Qwen3-0.6B --port 9000  from the hub
  gqa-serve chat --url http://127.0.0.1:8000     talk to a running server
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {"serve": _serve, "chat": _chat}
    run = commands[words.pop(0)] if words and words[0] in commands else _serve
    try:
        run(words)
    except GqaServeError as error:
        print(f"gqa-serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(prog: str, description: str, **options: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,  # type: ignore[arg-type]
    )
    parser.add_argument("--version", action="version", version=f"gqa-serve {__version__}")
    return parser


def _serve(words: list[str]) -> None:
    parser = _parser(
        "gqa-serve",
        "Serve a language model over an OpenAI-compatible HTTP API.",
        usage="gqa-serve [serve] --model MODEL [options]",
        epilog=_EPILOG,
    )
    add_flags(parser, EngineConfig, ServerConfig)
    engine_config, server_config = collect([EngineConfig, ServerConfig], vars(parser.parse_args(words)))
    _require_model(engine_config)

    from gqa_serve.logs import configure_logging
    from gqa_serve.server import serve

    configure_logging(server_config.log_level)
    serve(engine_config, server_config)


def _chat(words: list[str]) -> None:
    parser = _parser(
        "gqa-serve chat",
        "Chat in the terminal, with a running server or with a model loaded here.",
        usage="gqa-serve chat (--url URL | --model MODEL) [options]",
    )
    group = parser.add_argument_group("chat")
    group.add_argument("--url", help="a running server, e.g. http://127.0.0.1:8000")
    group.add_argument("--system", help="system message")
    group.add_argument("--temperature", type=float, help="0 is greedy; default: the model's")
    group.add_argument("--max-tokens", type=int, help="longest answer, in tokens")
    add_flags(parser, EngineConfig)
    args = parser.parse_args(words)
    (config,) = collect([EngineConfig], vars(args))
    options = {n: v for n in ("temperature", "max_tokens") if (v := getattr(args, n)) is not None}
    if args.url is not None and hasattr(args, "model"):
        raise ConfigError("Give either --url or --model, not both.")

    from gqa_serve.chat import run_chat

    if args.url is not None:
        run_chat(url=args.url, system=args.system, options=options)
        return
    _require_model(config)

    from gqa_serve.engine.llm import LLM
    from gqa_serve.logs import configure_logging

    configure_logging("warning")
    run_chat(llm=LLM.from_config(config), system=args.system, options=options)


def _require_model(config: EngineConfig) -> None:
    if not config.model:
        raise ConfigError("Which model? Give --model a hub id, a directory, a .gguf file, or 'demo'.")


if __name__ == "__main__":
    sys.exit(main())
