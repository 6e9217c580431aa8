"""The parts that Ray calls, without a cluster: the policy, the router, the ingress, a replica's health."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import yaml
from starlette.types import Message

from gqa_serve.deploy.http_request import DECLINED_BY, HttpRequest
from gqa_serve.deploy.ray_autoscaling import KV_USE, READY, REQUESTS, WAITING_TOKENS, EngineLoadPolicy
from gqa_serve.engine.metrics import StepStats
from gqa_serve.errors import ConfigError

with warnings.catch_warnings():  # of Ray's own code
    warnings.simplefilter("ignore")
    pytest.importorskip("ray.serve", reason="Ray is not installed; pip install 'gqa-serve[ray]'")

from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.request_router import PendingRequest
from ray.serve.schema import ServeDeploySchema

from gqa_serve.deploy import ray_ingress, ray_replica
from gqa_serve.deploy.ray_app import app
from gqa_serve.deploy.ray_ingress import Ingress
from gqa_serve.deploy.ray_replica import EngineReplica
from gqa_serve.deploy.ray_router import PrefixRouter

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
TARGETS = {REQUESTS: 10, WAITING_TOKENS: 1000, KV_USE: 0.8}


# --- the number of replicas ---------------------------------------------------------------------------------


def wanted(queued: float = 0.0, **figures: list[float]) -> float:
    metrics = {name: dict(enumerate(values)) for name, values in figures.items()}
    context = SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=queued)
    number, state = EngineLoadPolicy(TARGETS)(context)
    assert state == {}
    return number


def test_each_figure_asks_for_its_share() -> None:
    assert wanted(requests=[10, 30], waiting_tokens=[0, 0], kv_use=[0.1, 0.1]) == 4
    assert wanted(requests=[1, 1], waiting_tokens=[2500, 500], kv_use=[0.1, 0.1]) == 3
    assert wanted(requests=[1, 1], waiting_tokens=[0, 0], kv_use=[0.9, 0.9]) == pytest.approx(2.25)


def test_what_waits_outside_counts_as_requests() -> None:
    assert wanted(queued=25, requests=[5]) == 3
    assert wanted(queued=25) == 2.5  # no replica has reported yet


def test_no_load_asks_for_nothing() -> None:
    assert wanted() == 0
    assert wanted(requests=[0.0], waiting_tokens=[0.0], kv_use=[0.0]) == 0


# --- the router ---------------------------------------------------------------------------------------------


class Replica(SimpleNamespace):
    """What the router sees of one."""

    def __init__(self, name: str, **stats: Any) -> None:
        super().__init__(replica_id=ReplicaID(name, DeploymentID("Engine")), routing_stats=stats)


def router() -> PrefixRouter:
    made = PrefixRouter(DeploymentID("Engine"), DeploymentHandleSource.REPLICA)
    made.initialize_state(imbalance=2)
    return made


def routed(keys: tuple[bytes, ...] = (), declined_by: tuple[str, ...] = ()) -> PendingRequest:
    return PendingRequest(args=[HttpRequest({}, b"", keys, declined_by)], kwargs={}, metadata=None)


def first_of(
    made: PrefixRouter,
    replicas: list[Replica],
    keys: tuple[bytes, ...] = (),
    declined_by: tuple[str, ...] = (),
) -> list[str]:
    async def choose() -> list[list[Any]]:
        request = routed(keys, declined_by)
        ranks = await made.choose_replicas(replicas, request)
        assert request.routing_context.should_backoff  # or Ray would look again without a pause
        return ranks

    return [replica.replica_id.unique_id for replica in asyncio.run(choose())[0]]


def test_the_router_remembers_what_it_sent() -> None:
    made, replicas = router(), [Replica("a"), Replica("b"), Replica("c")]
    for name, keys in (("b", (b"1",)), ("c", (b"1", b"2"))):
        replica_id = next(each.replica_id for each in replicas if each.replica_id.unique_id == name)

        async def note(keys: tuple[bytes, ...] = keys, replica_id: ReplicaID = replica_id) -> None:
            made.on_request_routed(routed(keys), replica_id, None)

        asyncio.run(note())
    assert first_of(made, replicas, (b"1", b"2", b"3")) == ["c"]
    assert sorted(first_of(made, replicas, (b"1", b"9"))) == ["b", "c"]


def test_the_router_counts_what_is_under_way() -> None:
    made, (a, b) = router(), (Replica("a"), Replica("b"))
    for _ in range(3):
        made.on_send_request(a.replica_id)
    assert first_of(made, [a, b]) == ["b"]
    for _ in range(3):
        made.on_request_completed(a.replica_id, "")
    made.on_send_request(b.replica_id)
    assert first_of(made, [a, b]) == ["a"]
    assert first_of(made, [Replica("a", requests=7), b]) == ["b"]  # others send there, too


def test_an_engine_that_is_not_ready_is_the_last_resort() -> None:
    down, busy = Replica("down", ready=False, requests=0), Replica("busy", ready=True, requests=9)
    assert first_of(router(), [down, busy]) == ["busy"]
    assert first_of(router(), [down]) == ["down"]


def test_who_declined_a_request_is_asked_again_only_if_nobody_is_left() -> None:
    """What is reported of an engine is some seconds old: this one died a moment ago, and looks idle."""
    died, busy, down = (
        Replica("died", ready=True, requests=0),
        Replica("busy", requests=9),
        Replica("down", ready=False),
    )
    assert first_of(router(), [died, busy, down]) == ["died"]
    assert first_of(router(), [died, busy, down], declined_by=("died",)) == ["busy"]
    assert first_of(router(), [died, down], declined_by=("died",)) == ["down"]
    assert first_of(router(), [died], declined_by=("died",)) == ["died"]


def test_without_replicas_or_a_request_there_is_no_preference() -> None:
    assert asyncio.run(router().choose_replicas([])) == []
    assert len(asyncio.run(router().choose_replicas([Replica("a"), Replica("b")]))) == 2


# --- the ingress --------------------------------------------------------------------------------------------

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"x-request-id", b"1"), (b"x-kept", b"2")],
}


class Engines:
    """Stands for Ray's handle: each call of `remote` takes the next script, of batches and exceptions."""

    def __init__(self, *scripts: list[Any], everyone: Sequence[Any] | Exception = ()) -> None:
        self.scripts = list(scripts)
        self.requests: list[HttpRequest] = []
        self.num_cancelled = 0
        self.everyone = everyone

    def options(self, *, stream: bool, method_name: str) -> Engines:
        assert (stream, method_name) == (True, "answer")
        return self

    def remote(self, request: HttpRequest) -> Answer:
        self.requests.append(request)
        return Answer(self, self.scripts.pop(0))

    def broadcast(self, method_name: str, request: HttpRequest) -> Engines:
        self.requests.append(request)
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> Sequence[Any]:
        assert return_exceptions
        if isinstance(self.everyone, BaseException):
            raise self.everyone
        return self.everyone


class Answer:
    def __init__(self, engines: Engines, script: list[Any]) -> None:
        self._engines = engines
        self._script = iter(script)

    def __aiter__(self) -> AsyncIterator[list[Message]]:
        return self

    async def __anext__(self) -> list[Message]:
        for item in self._script:
            if isinstance(item, BaseException):
                raise item
            if item == "hang":
                await asyncio.Event().wait()
            found: list[Message] = item
            return found
        raise StopAsyncIteration

    def cancel(self) -> None:
        self._engines.num_cancelled += 1


def ask(
    engines: Engines, method: str = "POST", path: str = "/v1/completions", **options: Any
) -> httpx2.Response:
    ingress = Ingress(engines, max_body_bytes=10_000, replica_timeout_s=0.05)

    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(ingress)
        async with httpx2.AsyncClient(transport=transport, base_url="http://testserver") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def body(text: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def test_an_answer_is_passed_on() -> None:
    engines = Engines([[], [START, body(b"a", more=True)], [body(b"b")]])
    response = ask(engines, json={"prompt": "x" * 300})
    assert (response.status_code, response.content) == (200, b"ab")
    assert response.headers.get("x-request-id") is None  # Ray's proxy puts it there
    assert response.headers["x-kept"] == "2"
    (request,) = engines.requests
    assert json.loads(request.body) == {"prompt": "x" * 300}
    assert len(request.prefix_keys) == 1
    assert request.scope["path"] == "/v1/completions"
    assert engines.num_cancelled == 0


def test_a_large_body_has_keys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_ingress, "_LARGE_BODY_BYTES", 100)
    engines = Engines([[], [START, body(b"")]])
    ask(engines, json={"prompt": "x" * 300})
    assert len(engines.requests[0].prefix_keys) == 1


def test_a_replica_that_dies_before_it_answers_is_replaced_by_another() -> None:
    assert ask(Engines([[], ActorDiedError()], [[], [START, body(b"ok")]])).content == b"ok"
    refused = ask(Engines(*[[ActorDiedError()] for _ in range(3)]))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")


def test_a_request_that_a_replica_declines_goes_to_another() -> None:
    engines = Engines([[{DECLINED_BY: "a"}]], [[{DECLINED_BY: "b"}]], [[], [START, body(b"ok")]])
    assert ask(engines).content == b"ok"
    assert [request.declined_by for request in engines.requests] == [(), ("a",), ("a", "b")]
    refused = ask(Engines(*[[[{DECLINED_BY: name}]] for name in "abc"]))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")


@pytest.mark.parametrize("error", [ActorDiedError(), TimeoutError(), asyncio.TimeoutError()])
def test_an_answer_that_breaks_off_is_not_ended(error: Exception) -> None:
    engines = Engines([[], [START, body(b"half", more=True)], error], [[], [START, body(b"again")]])
    with pytest.raises(type(error)):
        ask(engines)
    assert len(engines.requests) == 1  # what was begun is not begun anew


@pytest.mark.parametrize("script", [["hang"], [DeploymentUnavailableError(DeploymentID("Engine"))]])
def test_nobody_waits_for_ever_for_an_engine(script: list[Any]) -> None:
    refused = ask(Engines(script))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    refused = ask(Engines(script), path="/v1/messages")
    assert (refused.status_code, refused.json()["type"]) == (503, "error")


def test_a_client_that_leaves_is_told_to_the_engine() -> None:
    engines = Engines([[], [START, body(b"a", more=True)], "hang"])
    ingress = Ingress(engines, max_body_bytes=10_000, replica_timeout_s=60)

    async def run() -> None:
        passed = asyncio.Event()

        async def receive() -> Message:
            return {"type": "http.request"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                passed.set()

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        call = asyncio.ensure_future(ingress(scope, receive, send))
        await passed.wait()
        call.cancel()  # as Ray does
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(run())
    assert engines.num_cancelled == 1


def test_metrics_are_those_of_every_replica() -> None:
    said = [("r1", 200, [], b"a 1\n"), RuntimeError("gone"), ("r2", 200, [], b"a 2\n")]
    engines = Engines(everyone=said)
    response = ask(engines, "GET", "/metrics", headers={"accept": "application/openmetrics-text"})
    assert response.text.split("\n")[:2] == ['a{replica="r1"} 1', 'a{replica="r2"} 2']
    assert b"accept" not in dict(engines.requests[0].scope["headers"])  # one format, which can be merged


def test_metrics_are_as_guarded_as_in_the_application() -> None:
    headers = [(b"x-why", b"key"), (b"X-Request-Id", b"1")]
    refused = ask(Engines(everyone=[("r1", 401, headers, b"no")]), "GET", "/metrics")
    assert (refused.status_code, refused.content) == (401, b"no")
    assert dict(refused.headers) == {"x-why": "key"}


def test_metrics_of_nobody() -> None:
    for error in (TimeoutError(), DeploymentUnavailableError(DeploymentID("Engine"))):
        assert ask(Engines(everyone=error), "GET", "/metrics").status_code == 503


def test_lifespan_and_websockets_are_answered() -> None:
    ingress = Ingress(Engines(), max_body_bytes=1, replica_timeout_s=1)

    async def run(kind: str, *messages: str) -> list[str]:
        left, sent = list(messages), []

        async def receive() -> Message:
            return {"type": left.pop(0)}

        async def send(message: Message) -> None:
            sent.append(message["type"])

        await ingress({"type": kind}, receive, send)
        return sent

    assert asyncio.run(run("lifespan", "lifespan.startup", "lifespan.shutdown")) == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert asyncio.run(run("websocket")) == ["websocket.close"]


# --- a replica's health and figures -------------------------------------------------------------------------


class Unmade(EngineReplica):
    """Python's garbage collector does not await a `__del__`, as Ray does."""

    def __del__(self) -> None: ...


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A replica whose constructor was left out, around an engine that holds two requests."""
    made: Any = object.__new__(Unmade)
    info = SimpleNamespace(num_blocks=100)
    made._engine = SimpleNamespace(state="ready", num_requests=2, model_info=info)
    made._restart_timeout_s, made._well_at, made._count_step = 10.0, 0.0, lambda stats: None
    made._gauges = {name: SimpleNamespace(set=lambda value: None) for name in (*TARGETS, READY)}
    made.clock = SimpleNamespace(monotonic=lambda: made.now)
    made.now = 0.0
    monkeypatch.setattr(ray_replica, "time", made.clock)
    return made


def health(replica: Any, state: str, now: float) -> None:
    replica._engine.state, replica.now = state, now
    asyncio.run(replica.check_health())


def test_an_engine_that_restarts_gets_its_time(replica: Any) -> None:
    health(replica, "ready", 100)
    health(replica, "restarting", 101)
    health(replica, "restarting", 110)
    health(replica, "ready", 112)
    health(replica, "restarting", 121)
    with pytest.raises(RuntimeError, match="has not come back for 11 s"):
        health(replica, "restarting", 123)


@pytest.mark.parametrize(
    ("state", "declined_by", "answer"),
    [
        ("ready", (), [[], "answered"]),
        ("restarting", (), [[{DECLINED_BY: "me"}]]),
        ("restarting", ("other",), [[{DECLINED_BY: "me"}]]),
        ("restarting", ("other", "me"), [[], "answered"]),
    ],
)
def test_a_replica_without_an_engine_declines_once(
    replica: Any, monkeypatch: pytest.MonkeyPatch, state: str, declined_by: tuple[str, ...], answer: list[Any]
) -> None:
    async def answered(app: object, request: HttpRequest) -> AsyncIterator[Any]:
        for batch in [], "answered":
            yield batch

    monkeypatch.setattr(ray_replica, "_name", lambda: "me")
    monkeypatch.setattr(ray_replica, "answer_messages", answered)
    replica._engine.state, replica._app = state, None

    async def all_of() -> list[Any]:
        return [batch async for batch in replica.answer(HttpRequest({}, b"", (), declined_by))]

    assert asyncio.run(all_of()) == answer


def test_an_engine_that_failed_is_the_end_of_its_replica(replica: Any) -> None:
    with pytest.raises(RuntimeError, match="cannot be restarted"):
        health(replica, "failed", 1)


def test_figures_are_those_of_the_last_step(replica: Any) -> None:
    replica._stepped(StepStats(num_waiting_tokens=70, num_free_blocks=25))
    figures = asyncio.run(replica.record_autoscaling_stats())
    assert figures == {REQUESTS: 2.0, WAITING_TOKENS: 70.0, KV_USE: 0.75}
    assert asyncio.run(replica.record_routing_stats()) == {READY: True, REQUESTS: 2}
    replica._engine.num_requests, replica._engine.state = 0, "restarting"
    assert asyncio.run(replica.record_autoscaling_stats()) == {
        REQUESTS: 0.0,
        WAITING_TOKENS: 0.0,
        KV_USE: 0.0,
    }
    assert asyncio.run(replica.record_routing_stats()) == {READY: False, REQUESTS: 0}


# --- what Ray is told ---------------------------------------------------------------------------------------


def test_ray_is_told_the_settings() -> None:
    made = app(
        {"model": "demo", "min_replicas": 2, "max_replicas": 5, "max_num_seqs": 10, "drain_timeout": 7}
    )
    ingress = made._bound_deployment
    (engine,) = (each._bound_deployment for each in ingress.init_args)
    assert (ingress.name, engine.name) == ("Ingress", "Engine")
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.policy.get_policy()(**scaling.policy.policy_kwargs)._targets[REQUESTS] == 5
    assert engine._deployment_config.graceful_shutdown_timeout_s == 12
    assert engine.max_ongoing_requests > 10 + 1024
    with pytest.raises(ConfigError, match="no setting 'modle'"):
        app({"modle": "demo"})


def examples() -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return [
        block.split("```")[0] for block in text.split("```yaml\n")[1:] if "ray_app" in block.split("```")[0]
    ]


def test_the_documented_files_fit_rays_schema_and_our_settings() -> None:
    assert examples()
    for example in examples():
        deployed = ServeDeploySchema.model_validate(yaml.safe_load(example))
        for application in deployed.applications:
            assert application.import_path == "gqa_serve.deploy.ray_app:app"
            app(application.args)
    silent = ServeDeploySchema.model_validate({"applications": []})
    assert silent.http_options.host == "0.0.0.0"  # as the example says of Ray's default
