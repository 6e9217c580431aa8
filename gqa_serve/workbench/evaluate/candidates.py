"""The candidates: which checkpoints in which settings are compared, and under which names.

Owns how the flags become `EngineConfig`s and what cannot be served here, which is found before anything is
computed. Loads no weights. Invariant: names are unique; the first candidate is the reference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gqa_serve import __version__
from gqa_serve.config import EngineConfig, collect
from gqa_serve.engine.model_config import ModelConfig
from gqa_serve.errors import ConfigError, GqaServeError
from gqa_serve.settings import did_you_mean, flag_of

LISTED = ("kv_cache_dtype", "quantization", "dtype", "backend")
"""Settings of which several can be compared: commas in the flag."""

SETTINGS = (
    *(
        "model",
        "revision",
        "download_dir",
        "offline",
        "dtype",
        "quantization",
        "device",
        "backend",
        "threads",
    ),
    *("cpu_isa", "deterministic", "attention_backend", "enforce_eager", "max_model_len", "block_size"),
    *("max_num_batched_tokens", "kv_cache_dtype", "gpu_memory_utilization"),
)
"""What a candidate can set. Others (queues, prefix cache) change no number that is measured here."""


def settings_class() -> type:
    """A dataclass of those fields of `EngineConfig` that are flags of eval, but for the model."""
    fields = {field.name: field for field in dataclasses.fields(EngineConfig)}
    chosen = [
        (name, fields[name].type, dataclasses.field(default=fields[name].default, metadata=metadata))
        for name in SETTINGS
        if name != "model"
        for metadata in (_metadata(fields[name]),)
    ]
    return dataclasses.make_dataclass("EvalSettings", chosen, frozen=True)


def _metadata(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.name not in LISTED:
        return dict(field.metadata)
    return {**field.metadata, "help": f"{field.metadata['help']}; several with commas are compared"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A checkpoint (`path`, found) in one setting."""

    name: str
    config: EngineConfig
    path: Path
    model: ModelConfig
    block_bytes: int
    """Of one KV block, as its backend holds it."""

    def sized(self, longest: int, kv_tokens: int, num_rows: int) -> EngineConfig:
        """Its config for sequences of at most `longest` tokens, with a KV cache for `kv_tokens` in all.

        Where the rotary embedding depends on the context length served, that stays what it is.
        """
        config = self.config
        stretched = any(rope and rope.rope_type in ("dynamic", "longrope") for rope in self.model.ropes)
        context = config.max_model_len
        if context is None and not stretched:
            context = min(longest, self.model.max_model_len)
        blocks = -(-kv_tokens // config.block_size) + num_rows
        return dataclasses.replace(
            config,
            max_model_len=context,
            max_num_seqs=num_rows,
            max_num_batched_tokens=max(config.max_num_batched_tokens, num_rows),
            kv_cache_memory=blocks * self.block_bytes,
            prefix_caching=False,
        )

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = EngineConfig()
        return {name: v for name in SETTINGS if (v := getattr(self.config, name)) != getattr(default, name)}

    def key(self, work: Mapping[str, Any]) -> str:
        """A name for the numbers: of the settings, the files of the checkpoint, the work, and who did it."""
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        text = json.dumps([__version__, self.settings(), stats, work], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def expand(
    models: Sequence[str], flags: Mapping[str, Any], named: Sequence[str], config_file: str | None
) -> list[tuple[str, EngineConfig]]:
    """Names and configs of every combination of `models` and of what `flags` list with commas, then of
    `named` candidates ("NAME:key=value,..."), which take from the flags what they do not say.

    Raises ConfigError.
    """
    lists = {name: _split(value) for name, value in flags.items() if name in LISTED}
    single = {name: value for name, value in flags.items() if name not in LISTED}
    given: list[tuple[dict[str, Any], str | None]] = []
    wanted: list[str | None] = [*models] if models or named else [None]
    for model in wanted:
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            given.append(({**single, **chosen, **({} if model is None else {"model": model})}, None))
    for words in named:
        name, own = _parse_named(words)
        rest = {key: values[0] for key, values in lists.items() if len(values) == 1}
        unclear = [key for key, values in lists.items() if len(values) > 1 and key not in own]
        if unclear:
            raise ConfigError(
                f"--candidate {name} does not say which of {flag_of(unclear[0])} {flags[unclear[0]]} it "
                f"takes; add {unclear[0].replace('_', '-')}=... to it."
            )
        base = {"model": models[0]} if len(models) == 1 else {}
        given.append(({**single, **rest, **base, **own}, name))
    configs = [(_collect(chosen, config_file), name) for chosen, name in given]
    names = iter(_names([config for config, name in configs if name is None]))
    result = [(name if name is not None else next(names), config) for config, name in configs]
    for name, count in _counts(name for name, _ in result).items():
        if count > 1:
            raise ConfigError(f"Two candidates are named {name}; leave one out, or name them by --candidate.")
    return result


def _collect(chosen: Mapping[str, Any], config_file: str | None) -> EngineConfig:
    (config,) = collect([EngineConfig], {**chosen, "config": config_file})
    if not config.model:
        raise ConfigError("Evaluate what? Give --model a hub id, a directory, a .gguf file, or 'demo'.")
    return config  # type: ignore[no-any-return]


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",")]


def _parse_named(words: str) -> tuple[str, dict[str, str]]:
    """Name and settings of "NAME:key=value,key=value"."""
    name, colon, rest = words.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    if not colon or not name.strip() or not all(equals and value for _, equals, value in pairs):
        raise ConfigError(
            f"--candidate {words}: write NAME:key=value,key=value, e.g. small:model=demo,kv-cache-dtype=int8"
        )
    own = {key.strip().replace("-", "_"): value.strip() for key, _, value in pairs}
    for key in own:
        if key not in SETTINGS:
            raise ConfigError(
                f"--candidate {name}: there is no setting {key!r} here.{did_you_mean(key, SETTINGS)}"
            )
    return name.strip(), own


def _names(configs: Sequence[EngineConfig]) -> Iterable[str]:
    """What tells each from the others: the model, if there are several, and the settings that vary."""
    models = {config.model for config in configs}
    tails = {Path(model).name for model in models}
    varying = [name for name in LISTED if len({getattr(config, name) for config in configs}) > 1]
    for config in configs:
        model = Path(config.model).name if len(tails) == len(models) else config.model
        parts = [model] if len(models) > 1 or not varying else []
        yield ", ".join(parts + [f"{_SHORT[name]} {getattr(config, name)}" for name in varying])


_SHORT = {"kv_cache_dtype": "KV", "quantization": "weights", "dtype": "dtype", "backend": "backend"}


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def find(named: Sequence[tuple[str, EngineConfig]]) -> list[Candidate]:
    """The candidates with their checkpoints, found or downloaded, and checked against this machine.

    Raises ConfigError naming the candidate that can't be served here, ModelError, HubError.
    """
    from gqa_serve.engine.weights.checkpoint import open_checkpoint
    from gqa_serve.engine.weights.hub import resolve_model

    found = []
    for name, config in named:
        path = resolve_model(
            config.model,
            revision=config.revision,
            download_dir=config.download_dir,
            offline=config.offline,
        )
        checkpoint = open_checkpoint(path)
        model = ModelConfig.from_hf(checkpoint.raw_config, checkpoint.generation_config)
        try:
            if config.max_model_len is not None:
                model = model.with_max_model_len(config.max_model_len)
            block_bytes = _check_backend(config, model)
        except GqaServeError as error:
            raise ConfigError(f"Candidate {name} can't be evaluated here: {error}") from error
        found.append(Candidate(name, config, path, model, block_bytes))
    return found


def _check_backend(config: EngineConfig, model: ModelConfig) -> int:
    """Raise what loading would, without loading. Returns the bytes of a KV block."""
    from gqa_serve.engine.backends import BackendOptions, create_backend
    from gqa_serve.engine.model_runner import choose_device

    names = {field.name for field in dataclasses.fields(BackendOptions)} - {"checkpoint_dtype", "threads"}
    options = {name: getattr(config, name) for name in names}
    backend = create_backend(
        choose_device(config.device), BackendOptions(**options, checkpoint_dtype=model.dtype)
    )
    if config.block_size % backend.block_multiple:
        raise ConfigError(
            f"--block-size {config.block_size} is not a multiple of {backend.block_multiple}, which the "
            f"{backend.name} backend needs."
        )
    return backend.block_bytes(model, config.block_size)
