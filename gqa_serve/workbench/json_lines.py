"""Files of dataclasses, one JSON object a line: what tools measured, for other tools to read.

Owns the reading and its errors. Knows no dataclass: types are checked as its fields declare them. Imports no
torch.
Invariant: what is wrong is an error that names the line, never a value that fails later.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gqa_serve.errors import ConfigError

_Kind = TypeVar("_Kind")


def read_json_lines(path: Path, kind: type[_Kind], name: str) -> list[_Kind]:
    """The objects of a file; blank lines are skipped. `name`: what one is called in errors.

    Raises ConfigError for a file that can't be read, and for a line that is no JSON, has unknown fields,
    lacks one, or has one of another type, NaN and infinities included.
    """
    found = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        found.append(_parse(line, kind))
                    except (msgspec.MsgspecError, ValueError) as error:
                        raise ConfigError(f"{path}, line {number}: no {name} ({error}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Could not read {path}: {error}.") from error
    return found


def write_json_lines(path: Path, items: Iterable[Any]) -> None:
    """Write dataclasses so that `read_json_lines` reads them. Raises ConfigError if it can't be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(item)) + "\n" for item in items)
    except OSError as error:
        raise ConfigError(f"Could not write {path}: {error.strerror}.") from error


def _parse(line: str, kind: type[_Kind]) -> _Kind:
    fields = msgspec.json.decode(line)
    if not isinstance(fields, dict):
        raise ValueError("expected an object")
    unknown = set(fields) - {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"unknown field {min(unknown)}")
    return msgspec.convert(fields, kind)
