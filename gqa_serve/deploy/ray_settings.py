"""What `serve run gqa_serve.deploy.ray_app:app name=value ...` takes: the server's settings, and Ray's.

Owns `RaySettings` and which settings of `gqa-serve` make no sense where Ray owns the address, the connections
and the number of engines; these are refused with the cure. Reads arguments only, no environment: what a
replica does must not depend on the machine it is placed on. Knows no Ray and no torch. Invariant: what Ray
accounts for a replica (`cpus`, `gpus`) is what its engine uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from gqa_serve.config import EngineConfig, ServerConfig
from gqa_serve.errors import ConfigError
from gqa_serve.settings import check, did_you_mean, from_settings, setting

_PROXY = "Connections are Ray's, see docs/scaling.md; leave it out."
_PER_REPLICA = "Each replica would count by itself; limit what a key may do in the gateway before Ray."
_REFUSED = {
    "host": "The address is Ray's: `http_options: {host: ...}` in the file of `serve deploy`.",
    "port": "The address is Ray's: `http_options: {port: ...}` in the file of `serve deploy`.",
    "root_path": "It is Ray's: `route_prefix: /llm` in the file, or --route-prefix of `serve run`.",
    "read_timeout": _PROXY,
    "send_timeout": _PROXY,
    "max_connections": _PROXY,
    "api_key": "Ray's dashboard shows arguments; put the keys into a file on each machine, and its name into "
    "api_key_file.",
    "key_max_requests": _PER_REPLICA,
    "key_tokens_per_minute": _PER_REPLICA,
    "max_stored_responses": "A response would stay with one replica, and the next request may go to another. "
    "Let clients send the whole conversation.",
    "data_parallel_size": "Ray starts the engines: say how many with min_replicas and max_replicas.",
    "config": "The arguments stand in the file of `serve deploy` themselves, below `args:`.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RaySettings:
    """What Ray is asked for. Raises ConfigError if a value is out of range."""

    min_replicas: int = setting(1, "engines at least", "replicas", low=1)
    max_replicas: int | None = setting(None, "engines at most; default: min_replicas", "replicas", low=1)
    cpus: int | None = setting(
        None, "cores of an engine's machine that it gets; default: one for each thread", "replicas", low=1
    )
    gpus: int | None = setting(
        None, "GPUs of an engine; default: tensor_parallel_size with device=cuda, else 0", "replicas", low=0
    )
    ingress_replicas: int = setting(2, "processes that read requests and choose engines", "replicas", low=1)
    surge: int = setting(
        0, "engines started before old ones stop on an update, in percent of all", "replicas", low=0, high=100
    )
    target_requests: int | None = setting(
        None,
        "requests, computed or queued, that one engine should have; default: half of max_num_seqs",
        "autoscaling",
        low=1,
    )
    target_waiting_tokens: int | None = setting(
        None,
        "prompt tokens that should wait for one engine; default: 4 x max_num_batched_tokens",
        "autoscaling",
        low=1,
    )
    target_kv_use: float = setting(
        0.8, "share of an engine's KV blocks that requests should hold", "autoscaling", low=0.01, high=1.0
    )
    upscale_delay: float = setting(
        30.0, "seconds of too much load before engines are added", "autoscaling", low=0
    )
    downscale_delay: float = setting(
        600.0, "seconds of too little load before engines are taken away", "autoscaling", low=0
    )
    look_back: float = setting(30.0, "seconds of which load is averaged", "autoscaling", low=0.1)
    imbalance: int = setting(
        8,
        "requests more than the least busy engine's with which one is still preferred for its prefix cache",
        "routing",
        low=0,
    )
    replica_timeout: float = setting(
        60.0, "seconds a request waits for an engine to take it, then it gets a 503", "routing", low=0.1
    )
    restart_timeout: float = setting(
        300.0,
        "seconds an engine process may need to come back before Ray replaces the replica",
        "routing",
        low=1,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})."
            )

    @property
    def most_replicas(self) -> int:
        """`max_replicas` with its default."""
        return self.min_replicas if self.max_replicas is None else self.max_replicas


class Settings(NamedTuple):
    """All there is to know; what defaults leave open is filled in."""

    engine: EngineConfig
    server: ServerConfig
    ray: RaySettings


def read_arguments(arguments: Mapping[str, Any]) -> Settings:
    """Settings from names and values (text, or what YAML makes of it). Raises ConfigError with the cure."""
    given = {name.replace("-", "_"): value for name, value in arguments.items()}
    parts: dict[type, dict[str, Any]] = {EngineConfig: {}, ServerConfig: {}, RaySettings: {}}
    own = {field.name: config for config in parts for field in dataclasses.fields(config)}
    for name, value in given.items():
        if name in _REFUSED:
            raise ConfigError(f"{name} is not for Ray. {_REFUSED[name]}")
        if name not in own:
            known = [each for each in own if each not in _REFUSED]
            raise ConfigError(f"There is no setting {name!r}.{did_you_mean(name, known)}")
        parts[own[name]][name] = value
    if not given.get("model"):
        raise ConfigError(
            "Which model? Give model=..., a hub id, a directory or .gguf file on each machine, or demo."
        )
    parts[ServerConfig]["max_stored_responses"] = 0
    engine, ray = _placed(
        from_settings(EngineConfig, parts[EngineConfig]), from_settings(RaySettings, parts[RaySettings])
    )
    return Settings(engine, from_settings(ServerConfig, parts[ServerConfig]), _with_targets(ray, engine))


def _placed(engine: EngineConfig, ray: RaySettings) -> tuple[EngineConfig, RaySettings]:
    """Device, threads (of each rank), cpus and gpus, each from the others where it is not given."""
    ranks = engine.tensor_parallel_size
    gpus = ray.gpus
    if gpus is None:
        gpus = ranks if engine.device == "cuda" else 0
    device = engine.device if engine.device != "auto" else "cuda" if gpus else "cpu"
    if gpus and device != "cuda":
        raise ConfigError(f"gpus={gpus} are of no use with device={device}; leave one of them out.")
    if device == "cuda" and gpus != ranks:
        raise ConfigError(
            f"With tensor_parallel_size={ranks} an engine uses {ranks}, not gpus={gpus}; leave gpus out."
        )
    threads = engine.threads
    cpus = ray.cpus or ranks * ((threads if device == "cpu" else None) or 1)
    if device == "cpu":
        threads = threads or max(1, cpus // ranks)
        if ranks * threads > cpus:
            raise ConfigError(
                f"An engine would have {ranks * threads} threads on cpus={cpus}; raise cpus, or leave it out."
            )
    return (
        dataclasses.replace(engine, device=device, threads=threads),
        dataclasses.replace(ray, cpus=cpus, gpus=gpus),
    )


def _with_targets(ray: RaySettings, engine: EngineConfig) -> RaySettings:
    return dataclasses.replace(
        ray,
        target_requests=ray.target_requests or max(1, engine.max_num_seqs // 2),
        target_waiting_tokens=ray.target_waiting_tokens or 4 * engine.max_num_batched_tokens,
    )
