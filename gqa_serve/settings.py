"""The mechanism of settings: fields of dataclasses as flags, environment variables and YAML lines.

Owns how a value is read from each place, converted to its field's type, checked against its range, and how
a wrong one is reported: by the name of the place it came from, as the user spelled it. Does not know which
settings there are (`config.py`) and reads no environment by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import logging
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gqa_serve.errors import ConfigError

ENV_PREFIX = "GQA_SERVE_"
_NO_SETTINGS = (ENV_PREFIX + "CONFIG", ENV_PREFIX + "REQUIRE_NATIVE")  # a file of them; for builds
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_MOST_DIGITS = 40  # of a size
_MOST_BYTES = 2**60

logger = logging.getLogger(__name__)


def parse_size(text: str | int) -> int:
    """Bytes of "512MiB", "2GiB", "1.5GB" or a plain number. Raises ConfigError."""
    match = None
    if isinstance(text, str | int | float) and len(shown := str(text)) <= _MOST_DIGITS:
        match = _SIZE.fullmatch(shown)
    size = int(Fraction(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else -1
    if match is None or match[2].upper() not in _UNITS or size > _MOST_BYTES:
        raise ConfigError(
            f"{short(text)} is not a size. Write bytes or a number with a unit: 512MiB, 2GiB, 1.5GB."
        )
    return size


def short(value: object) -> str:
    """The repr of a value for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def setting(default: Any, help: str, group: str, **extra: Any) -> Any:
    """A dataclass field with its help; `extra` may hold choices, metavar, low, high, parse, secret."""
    metadata = {"help": help, "group": group, **extra}
    return dataclasses.field(default=default, metadata=metadata, repr=not extra.get("secret"))


def check(config: Any) -> None:
    """Raises ConfigError if a field of `config` is outside its range."""
    for field in dataclasses.fields(config):
        _check_value(getattr(config, field.name), field, flag_of(field.name))


def _check_value(value: Any, field: dataclasses.Field[Any], source: str) -> None:
    meta = field.metadata
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{source} must be a finite number; got {value}.")
    if "choices" in meta and value not in meta["choices"]:
        raise ConfigError(f"{source} must be one of {', '.join(meta['choices'])}; got {short(value)}.")
    if "low" in meta and value < meta["low"]:
        raise ConfigError(f"{source} must be at least {meta['low']}; got {short(value)}.")
    if "high" in meta and value > meta["high"]:
        raise ConfigError(f"{source} must be at most {meta['high']}; got {short(value)}.")


def flag_of(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


# --- flags -------------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Give `parser` one flag per field of the config classes, grouped; unset flags stay out of the result."""
    groups: dict[str, Any] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            meta = field.metadata
            if meta["group"] not in groups:
                groups[meta["group"]] = parser.add_argument_group(meta["group"])
            options: dict[str, Any] = {"help": _help(field), "default": argparse.SUPPRESS, "dest": field.name}
            if _base_type(config, field) is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = str
                options["metavar"] = meta.get("metavar") or _metavar(config, field)
                if _base_type(config, field) is tuple:
                    options["nargs"] = "+"
            groups[meta["group"]].add_argument(flag_of(field.name), **options)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings")


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"])
    default = field.default
    if default in (None, "", ()) or "default" in text:
        return text
    if field.metadata.get("parse") is parse_size:
        return text  # the example in the help shows the unit
    return f"{text} ({'on' if default is True else 'off' if default is False else default})"


def _metavar(config: type, field: dataclasses.Field[Any]) -> str:
    if "choices" in field.metadata:
        return "{" + ",".join(field.metadata["choices"]) + "}"
    return {int: "N", float: "X"}.get(_base_type(config, field), field.name.rsplit("_", 1)[-1].upper())


def _base_type(config: type, field: dataclasses.Field[Any]) -> type:
    """`int` of `int | None`, `tuple` of `tuple[str, ...]`."""
    hint = typing.get_type_hints(config)[field.name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    base: type = typing.get_origin(hint) or hint
    return base


# --- values from everywhere --------------------------------------------------------------------------------

Config = TypeVar("Config")
_Known = Mapping[str, tuple[type, dataclasses.Field[Any]]]


class _Raw(NamedTuple):
    """A value as it was given; `source` is its place in the user's spelling."""

    value: Any
    source: str
    negated: bool = False


def read_settings(
    configs: Sequence[type], flags: Mapping[str, Any], environ: Mapping[str, str], known: Sequence[type]
) -> list[Any]:
    """One instance per class of `configs`, from flags, then environment, then the file, then defaults.

    `flags` maps field names to strings (as from `add_flags`) and may hold "config", the YAML file. Settings
    of `known` classes that are not asked for are legal, so that one file serves every command, but are not
    looked at. Raises ConfigError naming the flag, variable or line that is wrong.
    """
    file = flags.get("config") or environ.get(ENV_PREFIX + "CONFIG")
    fields = _fields(*known, *configs)
    raw = _from_file(Path(file), fields) if file else {}
    raw |= _from_env(environ, fields)
    raw |= {name: _Raw(flags[name], flag_of(name)) for name in fields if name in flags}
    return [
        config(
            **{name: _convert(raw[name], config, field) for name, (_, field) in own.items() if name in raw}
        )
        for config in configs
        for own in (_fields(config),)
    ]


def from_settings(config: type[Config], settings: Mapping[str, Any]) -> Config:
    """`config` from keyword arguments by field name; sizes may be text. Reads no environment and no file.

    Raises ConfigError for a value that cannot be used and for a name that is no setting.
    """
    own = _fields(config)
    for name in settings:
        if name not in own:
            raise ConfigError(f"There is no setting {name!r}.{did_you_mean(name, own)}")
    return config(
        **{name: _convert(_Raw(value, name), config, own[name][1]) for name, value in settings.items()}
    )


def did_you_mean(word: str, words: Iterable[str], spell: Callable[[str], str] = repr) -> str:
    """A hint to append to a message: the nearest of `words`, or nothing if none is near."""
    near = difflib.get_close_matches(word, list(words), 1)
    return f" Did you mean {spell(near[0])}?" if near else ""


def _fields(*configs: type) -> dict[str, tuple[type, dataclasses.Field[Any]]]:
    """Field by name; a later class wins where two have the same."""
    return {field.name: (config, field) for config in configs for field in dataclasses.fields(config)}


def _from_file(path: Path, known: _Known) -> dict[str, _Raw]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} must hold lines such as 'max-model-len: 4096'.")
    result: dict[str, _Raw] = {}
    for key in [node.value for node, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []:
        if key not in data:
            raise ConfigError(f"--config {path}: unknown setting {short(key)}.")
        name, negated = _setting_name(key.replace("-", "_"), known)
        if name not in known:
            hint = did_you_mean(name, known, lambda near: repr(near.replace("_", "-")))
            raise ConfigError(f"--config {path}: unknown setting {short(key)}.{hint}")
        if name in result:
            raise ConfigError(f"--config {path}: {key} is given twice; keep one of the lines.")
        result[name] = _Raw(data[key], f"{path}: {key}", negated)
    return result


def _setting_name(name: str, known: _Known) -> tuple[str, bool]:
    """The field of a name; for `no_prefix_caching`, as the flag is spelled, prefix_caching and True."""
    plain = name.removeprefix("no_")
    if name not in known and plain in known and _base_type(*known[plain]) is bool:
        return plain, True
    return name, False


def _from_env(environ: Mapping[str, str], known: _Known) -> dict[str, _Raw]:
    result: dict[str, _Raw] = {}
    for key, value in environ.items():
        # Compose files and shells pass an unset variable on as an empty one.
        if not key.startswith(ENV_PREFIX) or key in _NO_SETTINGS or not value:
            continue
        name, negated = _setting_name(key.removeprefix(ENV_PREFIX).lower(), known)
        if name not in known:
            hint = did_you_mean(name, known, lambda near: ENV_PREFIX + near.upper())
            logger.warning("Environment variable %s names no setting; see gqa-serve --help.%s", key, hint)
        elif name in result:
            raise ConfigError(f"{result[name].source} and {key} are one setting; set one of them.")
        else:
            result[name] = _Raw(value, key, negated)
    return result


def _convert(raw: _Raw, config: type, field: dataclasses.Field[Any]) -> Any:
    """A raw value (string, or what YAML made of it) as the field's type, in its range."""
    value, source, negated = raw
    base = _base_type(config, field)
    if value is None:
        if field.default is None:
            return None
        raise ConfigError(f"{source} needs a value.")
    try:
        if parse := field.metadata.get("parse"):
            converted = parse(value)
        else:
            converted = _READERS[base](value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        hint = ""
        if isinstance(value, str) and value.startswith("tcp://"):
            hint = " Kubernetes sets this variable for a service of this name; use enableServiceLinks: false."
        elif base in (str, tuple) and isinstance(value, int | float | datetime.date):
            hint = " Put it in quotes."  # YAML reads 1.10 as the number 1.1
        if field.metadata.get("secret"):
            raise ConfigError(f"{source} must be {_KINDS[base]}.{hint}") from None  # the cause may show it
        raise ConfigError(f"{source} must be {_KINDS[base]}; got {short(value)}.{hint}") from error
    _check_value(converted, field, source)
    return not converted if negated else converted


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "text or a list",
}
_BOOLEANS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(
    ("false", "0", "no", "off"), False
)


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text]


def _whole(value: Any) -> int:
    if isinstance(value, float | bool):
        raise TypeError(value)
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _text(value: Any) -> str:
    text = os.fspath(value)  # a str or, in LLM(Path(...)), a path; TypeError for all else
    if not isinstance(text, str):
        raise TypeError(value)
    return text


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts, or one text with commas."""
    items = list(value) if isinstance(value, list | tuple) else _text(value).split(",")
    texts = tuple(_text(item).strip() for item in items)
    if not all(texts):
        raise ValueError(value)
    return texts


_READERS: dict[type, Callable[[Any], Any]] = {
    bool: _boolean,
    int: _whole,
    float: _number,
    str: _text,
    tuple: _texts,
}
