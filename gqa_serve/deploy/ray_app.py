"""The server as an application of Ray Serve: engines on many machines behind one address.

    Ray's HTTP proxies   ->   Ingress         ->   PrefixRouter   ->   EngineReplica   ->   engine process
    (one a machine)           (reads bodies)       (chooses)           (the same app)       (the model)

Owns the deployments and what Ray is told of them. `serve run gqa_serve.deploy.ray_app:app model=... ` calls
`app` with the arguments; `RaySettings`, `EngineConfig` and `ServerConfig` say which there are. See
docs/scaling.md. Invariant: a change of arguments replaces the replicas, one after the other, each of which
finishes what it has begun.
"""

from __future__ import annotations

from typing import Any

try:
    from ray import serve
except ImportError as error:
    raise ImportError("gqa_serve.deploy.ray_app needs Ray Serve: pip install 'gqa-serve[ray]'") from error

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from starlette.types import ASGIApp

from gqa_serve.deploy.ray_autoscaling import KV_USE, REQUESTS, WAITING_TOKENS, EngineLoadPolicy
from gqa_serve.deploy.ray_replica import EngineReplica
from gqa_serve.deploy.ray_router import PrefixRouter
from gqa_serve.deploy.ray_settings import Settings, read_arguments

ENGINE = "Engine"
INGRESS = "Ingress"

_BESIDE_REQUESTS = 64  # requests that compute nothing (health, models, tokenize) beside a full engine
_INGRESS_REQUESTS = 10_000  # of one ingress process; it only passes on
_ROUTING_STATS_S = 2.0
_LOOK_S = 0.5  # between two looks whether a stopping replica has finished
_LAST_WORDS_S = 5.0  # after the drain timeout, for the engine process to end


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application with these settings, by name. Raises ConfigError."""
    settings = read_arguments(arguments)
    return _ingress(settings).bind(
        _engine(settings).bind(settings.engine, settings.server, settings.ray.restart_timeout)
    )


def _engine(settings: Settings) -> serve.Deployment:
    ray, engine = settings.ray, settings.engine
    policy = AutoscalingPolicy(
        policy_function=EngineLoadPolicy,
        policy_kwargs={
            "targets": {
                REQUESTS: ray.target_requests,
                WAITING_TOKENS: ray.target_waiting_tokens,
                KV_USE: ray.target_kv_use,
            }
        },
    )
    return serve.deployment(
        EngineReplica,
        name=ENGINE,
        ray_actor_options={"num_cpus": ray.cpus, "num_gpus": ray.gpus},
        max_ongoing_requests=engine.max_num_seqs + engine.max_waiting + _BESIDE_REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=ray.min_replicas,
            max_replicas=ray.most_replicas,
            upscale_delay_s=ray.upscale_delay,
            downscale_delay_s=ray.downscale_delay,
            look_back_period_s=ray.look_back,
            policy=policy,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"imbalance": ray.imbalance},
            request_routing_stats_period_s=_ROUTING_STATS_S,
        ),
        max_surge_percent=ray.surge,
        logging_config={"enable_access_log": False},  # the ingress has a line for each request
        graceful_shutdown_wait_loop_s=_LOOK_S,
        graceful_shutdown_timeout_s=settings.server.drain_timeout + _LAST_WORDS_S,
    )


def _ingress(settings: Settings) -> serve.Deployment:
    max_body_bytes, timeout_s = settings.server.max_body_bytes, settings.ray.replica_timeout

    def build() -> ASGIApp:  # called in each replica of the ingress
        from gqa_serve.deploy.ray_ingress import Ingress

        engines = serve.get_deployment_handle(ENGINE)
        return Ingress(engines, max_body_bytes=max_body_bytes, replica_timeout_s=timeout_s)

    return serve.deployment(
        serve.ingress(build)(),
        name=INGRESS,
        num_replicas=settings.ray.ingress_replicas,
        ray_actor_options={"num_cpus": 0},  # as Ray's proxies
        max_ongoing_requests=_INGRESS_REQUESTS,
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=_LOOK_S,
        graceful_shutdown_timeout_s=settings.server.drain_timeout + _LAST_WORDS_S,
    )
