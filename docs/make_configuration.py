"""Writes the tables of docs/configuration.md from the config classes: `python docs/make_configuration.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gqa_serve.config import EngineConfig, ServerConfig
from gqa_serve.settings import flag_of, parse_size

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"


def tables() -> str:
    """One Markdown table per group of settings."""
    groups: dict[str, list[str]] = {}
    for config in (EngineConfig, ServerConfig):
        for field in dataclasses.fields(config):
            flag = flag_of(field.name)
            if field.type == "bool" and field.default is True:
                flag = flag.replace("--", "--no-", 1)
            shown = "" if field.default is None else field.default
            if isinstance(field.default, bool):
                shown = "on" if field.default else "off"
            if field.metadata.get("parse") is parse_size and field.default is not None:
                shown = f"{field.default // 2**20}MiB"
            if choices := field.metadata.get("choices"):
                flag += " " + "\\|".join(choices)
            row = f"| `{flag}` | {shown or ''} | {field.metadata['help']} |"
            groups.setdefault(field.metadata["group"], []).append(row)
    parts = [
        f"## {group.capitalize()}\n\n| flag | default | meaning |\n|---|---|---|\n" + "\n".join(rows)
        for group, rows in groups.items()
    ]
    return "\n\n".join(parts) + "\n\n"


def page() -> str:
    """The page with its tables as they should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + "\n" + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
