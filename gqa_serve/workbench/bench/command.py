"""`gqa-serve bench [compare | saturate | selftest | kernel | engine]`: which of them was asked for."""

from __future__ import annotations

import importlib

from gqa_serve.errors import ConfigError
from gqa_serve.settings import did_you_mean, short

_COMMANDS = ("compare", "saturate", "selftest", "kernel", "engine")


def run(words: list[str]) -> None:
    """Run the command that the first word names; without one it is a run of traffic over a server."""
    name = "run"
    if words and not words[0].startswith("-"):
        name, *words = words
        if name not in _COMMANDS:
            hint = did_you_mean(name, _COMMANDS) or " A server is given as --url, a model as --model."
            raise ConfigError(f"There is no command bench {short(name)}.{hint}")
    importlib.import_module(f"gqa_serve.workbench.bench.{name}_command").run(words)
