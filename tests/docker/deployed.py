"""What the server makes of the command and the environment that a manifest gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from gqa_serve.command_line import make_parser
from gqa_serve.config import EngineConfig, ServerConfig, collect
from gqa_serve.settings import add_flags


def server_settings(command: Sequence[str], environ: Mapping[str, str]) -> tuple[EngineConfig, ServerConfig]:
    """As `gqa-serve COMMAND...` reads them; a flag or a variable that it does not have ends the test."""
    fields = [field.name for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)]
    asked = {name for name in environ if name.startswith("GQA_SERVE_")}
    assert asked <= {f"GQA_SERVE_{name.upper()}" for name in fields}
    parser = make_parser("gqa-serve", "")
    add_flags(parser, EngineConfig, ServerConfig)
    engine, server = collect([EngineConfig, ServerConfig], vars(parser.parse(list(command))), dict(environ))
    return engine, server
