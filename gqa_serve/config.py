"""Every setting, once: a dataclass field is a flag, an environment variable, a YAML line and its help.

`EngineConfig` is what the engine (and `LLM`) takes, `ServerConfig` what the HTTP server adds. A field's
name gives `--max-model-len`, `GQA_SERVE_MAX_MODEL_LEN` and `max-model-len:` (or `max_model_len:`) in the
file named by `--config`. Flags win over the environment, that wins over the file, that over the default.
This module is the only one that reads the environment (the hub's own HF_* variables are read by its
library). No torch here.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gqa_serve.errors import ConfigError

ENV_PREFIX = "GQA_SERVE_"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

logger = logging.getLogger(__name__)


def parse_size(text: str | int) -> int:
    """Bytes of "512MiB", "2GiB", "1.5GB" or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(
            f"{text!r} is not a size. Write bytes or a number with a unit: 512MiB, 2GiB, 1.5GB."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def setting(default: Any, help: str, group: str, **extra: Any) -> Any:
    """A dataclass field with its help; `extra` may hold choices, metavar, low, high, parse."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group, **extra})


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of the engine. Raises ConfigError if a value is out of range."""

    model: str = setting("", "hub id, directory, .gguf file, or 'demo'", "model")
    revision: str | None = setting(None, "branch, tag or commit on the hub", "model")
    download_dir: str | None = setting(None, "where hub files are cached", "model", metavar="DIR")
    offline: bool = setting(False, "use only files already downloaded", "model")
    dtype: str = setting(
        "auto",
        "precision of weights and KV cache; auto: the checkpoint's, float32 on a CPU",
        "model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "where to run", "model", choices=("auto", "cpu", "cuda", "mps"))
    seed: int | None = setting(
        None, "seed of requests that bring none; default: a new one each start", "model"
    )
    max_model_len: int | None = setting(
        None,
        "longest prompt + output, in tokens; default: the model's, or what the KV cache holds",
        "memory",
        low=1,
    )
    max_num_seqs: int = setting(128, "most requests computed at once", "memory", low=1)
    max_num_batched_tokens: int = setting(2048, "most tokens computed in one step", "memory", low=1)
    max_waiting: int = setting(
        1024, "most requests queued beyond those running; more get a 429", "memory", low=0
    )
    block_size: int = setting(16, "tokens per KV block", "memory", low=1, high=1024)
    kv_cache_memory: int | None = setting(
        None,
        "memory for the KV cache, e.g. 2GiB; default: measured",
        "memory",
        parse=parse_size,
        metavar="SIZE",
    )
    prefix_caching: bool = setting(True, "reuse KV blocks of equal prompt beginnings", "memory")

    def __post_init__(self) -> None:
        _check(self)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}), so that each running request can advance in every step."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the HTTP server around the engine."""

    host: str = setting("127.0.0.1", "address to listen on", "server")
    port: int = setting(8000, "port to listen on; 0 picks a free one", "server", low=0, high=65535)
    served_model_name: tuple[str, ...] = setting(
        (), "name(s) clients use; default: the value of --model", "server", metavar="NAME"
    )
    chat_template: str | None = setting(None, "Jinja file or text; default: the checkpoint's", "server")
    max_body_bytes: int = setting(
        16 * 2**20, "largest request body, e.g. 16MiB", "server", parse=parse_size, metavar="SIZE", low=1024
    )
    drain_timeout: float = setting(
        30.0, "seconds that running requests get to finish on shutdown", "server", low=0, metavar="S"
    )
    log_level: str = setting(
        "info", "how much to log", "server", choices=("debug", "info", "warning", "error", "critical")
    )

    def __post_init__(self) -> None:
        _check(self)


def _check(config: Any) -> None:
    for field in dataclasses.fields(config):
        value, meta = getattr(config, field.name), field.metadata
        flag = flag_of(field.name)
        if value is None:
            continue
        if "choices" in meta and value not in meta["choices"]:
            raise ConfigError(f"{flag} must be one of {', '.join(meta['choices'])}; got {value!r}.")
        if "low" in meta and value < meta["low"]:
            raise ConfigError(f"{flag} must be at least {meta['low']}; got {value}.")
        if "high" in meta and value > meta["high"]:
            raise ConfigError(f"{flag} must be at most {meta['high']}; got {value}.")


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
    if not any(action.dest == "config" for action in parser._actions):
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


def collect(
    configs: Sequence[type], flags: Mapping[str, Any], environ: Mapping[str, str] | None = None
) -> list[Any]:
    """One instance per class of `configs`, from flags, then environment, then the file, then defaults.

    `flags` maps field names to strings (as from `add_flags`) and may hold "config", the YAML file.
    Raises ConfigError naming the flag, variable or line that is wrong.
    """
    environ = os.environ if environ is None else environ
    file = flags.get("config") or environ.get(ENV_PREFIX + "CONFIG")
    fields = {field.name: (config, field) for config in configs for field in dataclasses.fields(config)}
    values: dict[str, Any] = {}
    for origin, raw in (
        ("file", _from_file(Path(file), fields) if file else {}),
        ("env", _from_env(environ, fields)),
        ("flag", {name: flags[name] for name in fields if name in flags}),
    ):
        for name, value in raw.items():
            source = {"file": f"{file}: {name}", "env": ENV_PREFIX + name.upper(), "flag": flag_of(name)}[
                origin
            ]
            values[name] = _convert(value, *fields[name], source)
    return [config(**{n: v for n, v in values.items() if fields[n][0] is config}) for config in configs]


def _from_file(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"--config {path} must hold lines such as 'max-model-len: 4096'.")
    result = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f" Did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise ConfigError(f"--config {path}: unknown setting {key!r}.{hint}")
        result[name] = value
    return result


def _from_env(environ: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, str]:
    result = {}
    for key, value in environ.items():
        if not key.startswith(ENV_PREFIX) or key == ENV_PREFIX + "CONFIG":
            continue
        name = key[len(ENV_PREFIX) :].lower()
        if name in fields:
            result[name] = value
        else:
            logger.warning("Environment variable %s names no setting; see gqa-serve --help.", key)
    return result


def _convert(value: Any, config: type, field: dataclasses.Field[Any], source: str) -> Any:
    """A raw value (string, or what YAML made of it) as the field's type."""
    base = _base_type(config, field)
    if value is None:
        if field.default is None:
            return None
        raise ConfigError(f"{source} needs a value.")
    try:
        if base is tuple:
            items = value if isinstance(value, list) else str(value).split(",")
            return tuple(str(item) for item in items)
        if base is bool:
            return _boolean(value)
        if parse := field.metadata.get("parse"):
            return parse(value)
        if base is int and isinstance(value, float | bool):
            raise ValueError
        return base(value)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (TypeError, ValueError) as error:
        what = {int: "a whole number", float: "a number", bool: "true or false"}.get(base, "text")
        hint = ""
        if isinstance(value, str) and value.startswith("tcp://"):
            hint = " Kubernetes sets this variable for a service of this name; use enableServiceLinks: false."
        raise ConfigError(f"{source} must be {what}; got {value!r}.{hint}") from error


_BOOLEANS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in _BOOLEANS:
        raise ValueError(text)
    return _BOOLEANS[text]
