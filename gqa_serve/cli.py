"""The `gqa-serve` command: parse, call, print errors as one sentence. Imports nothing heavy itself."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Sequence

from gqa_serve import __version__
from gqa_serve.command_line import make_parser
from gqa_serve.config import ChatConfig, EngineConfig, ServerConfig, collect, openai_api_key
from gqa_serve.errors import ConfigError, GqaServeError
from gqa_serve.settings import add_flags, did_you_mean, flag_of, short

_EPILOG = """commands: serve (default), chat; the workbench: plan, simulate, bench, convert, uptrain, eval.
`gqa-serve COMMAND --help` has the details of each.
Every setting can also be GQA_SERVE_NAME in the environment or a `name: value` line in --config FILE.

  gqa-serve --model demo                         a small model to try, if its weights are installed
  gqa-serve --model Qwen/Qwen3-0.6B --port 9000  from the hub
  gqa-serve chat --url http://127.0.0.1:8000     talk to a running server
"""

_WORKBENCH = {  # command -> package of gqa_serve.workbench whose `command.run` takes the words after it
    "plan": "plan",
    "simulate": "simulate",
    "bench": "bench",
    "convert": "convert",
    "uptrain": "uptrain",
    "eval": "evaluate",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _command(words)(words)
    except GqaServeError as error:
        print(f"gqa-serve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # whatever comes here was not foreseen: the traceback is what a report needs
        traceback.print_exc()
        print(
            f"gqa-serve: error: {type(error).__name__}: this is a defect of gqa-serve {__version__}; please "
            "report the lines above and the command.",
            file=sys.stderr,
        )
        return 1
    return 0


def _command(words: list[str]) -> Callable[[list[str]], None]:
    """What the first word asks for, taking it away; without a command it is serve."""
    commands: dict[str, Callable[[list[str]], None]] = {"serve": _serve, "chat": _chat}
    commands |= {tool: functools.partial(_run_tool, package) for tool, package in _WORKBENCH.items()}
    if not words or words[0].startswith("-"):
        return _serve
    word = words.pop(0)
    if word not in commands:
        hint = did_you_mean(word, commands) or f" A model is given as --model {word}."
        raise ConfigError(f"There is no command {short(word)}.{hint}")
    return commands[word]


def _run_tool(package: str, words: list[str]) -> None:
    from gqa_serve.workbench.signals import signals_as_exceptions

    with signals_as_exceptions():
        importlib.import_module(f"gqa_serve.workbench.{package}.command").run(words)


def _serve(words: list[str]) -> None:
    parser = make_parser(
        "gqa-serve",
        "Serve a language model over an OpenAI-compatible HTTP API.",
        usage="gqa-serve [serve] --model MODEL [options]",
        epilog=_EPILOG,
    )
    add_flags(parser, EngineConfig, ServerConfig)
    engine_config, server_config = collect([EngineConfig, ServerConfig], vars(parser.parse(words)))
    _require_model(engine_config)

    from gqa_serve.logs import configure_logging
    from gqa_serve.server import serve

    configure_logging(server_config.log_level, server_config.log_format)
    serve(engine_config, server_config)


def _chat(words: list[str]) -> None:
    parser = make_parser(
        "gqa-serve chat",
        "Chat in the terminal, with a running server or with a model loaded here.",
        usage="gqa-serve chat (--url URL | --model MODEL) [options]",
    )
    group = parser.add_argument_group("conversation")
    group.add_argument("--url", help="a running server, e.g. http://127.0.0.1:8000")
    group.add_argument("--api-key", metavar="KEY", help="key for --url; better in OPENAI_API_KEY")
    group.add_argument("--system", help="system message")
    group.add_argument("--temperature", type=float, help="0 is greedy; default: the model's")
    group.add_argument("--max-tokens", type=int, help="longest answer, in tokens")
    add_flags(parser, EngineConfig, ChatConfig)
    args = parser.parse(words)
    options = {n: v for n in ("temperature", "max_tokens") if (v := getattr(args, n)) is not None}
    if args.url is not None:
        _chat_with_server(args, options)
        return
    if args.api_key is not None:
        raise ConfigError("--api-key is for a server; give its --url too, or leave the key out.")
    config, chat_config = collect([EngineConfig, ChatConfig], vars(args))
    if not config.model:
        raise ConfigError(
            "Chat with what? Give --url of a running server, or --model a hub id, a directory, a .gguf file, "
            "or 'demo'."
        )

    from gqa_serve.chat import run_chat
    from gqa_serve.engine.llm import LLM
    from gqa_serve.logs import configure_logging

    configure_logging(chat_config.log_level)
    llm = LLM.from_config(config, chat_template=chat_config.chat_template)
    run_chat(llm=llm, system=args.system, options=options)


def _chat_with_server(args: argparse.Namespace, options: dict[str, float | int]) -> None:
    settings = {field for config in (EngineConfig, ChatConfig) for field in config.__dataclass_fields__}
    given = sorted(settings.intersection(vars(args)) | ({"config"} if args.config is not None else set()))
    if "model" in given:
        raise ConfigError("Give either --url or --model, not both.")
    if given:
        flags = ", ".join(flag_of(name) for name in given)
        raise ConfigError(f"With --url the server decides; leave out {flags}, or give --model instead.")
    if not args.url.strip():
        raise ConfigError("--url is empty; give the address of a server, e.g. http://127.0.0.1:8000")

    from gqa_serve.chat import run_chat

    api_key = args.api_key if args.api_key is not None else openai_api_key()
    run_chat(url=args.url, system=args.system, options=options, api_key=api_key)


def _require_model(config: EngineConfig) -> None:
    if not config.model:
        raise ConfigError("Which model? Give --model a hub id, a directory, a .gguf file, or 'demo'.")


if __name__ == "__main__":
    sys.exit(main())
