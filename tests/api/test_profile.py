"""POST /debug/profile: who may ask, one at a time, and what a profile leaves behind: nothing."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from typing import Any

import httpx2
import pytest
import torch
from fake_engine import FakeEngine, Server, serving, wait_until
from test_api_raw import post, send

from gqa_serve.engine import profiling
from gqa_serve.engine.profiling import ProfileBusyError, ProfileError, Profiles, Profiling
from gqa_serve.engine.wire import EndProfile, Profile, Profiled, ToEngine
from gqa_serve.errors import EngineUnavailableError

PATH = "/debug/profile"
TRACE = b'{"traceEvents": []}'


def done(num_steps: int = 3) -> Profiled:
    return Profiled(1, num_steps, gzip.compress(TRACE))


# --- HTTP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_trace_packed_if_asked(server: Server, packed: bool) -> None:
    server.engine.profiled = done()
    headers = {"accept-encoding": "gzip" if packed else "identity"}
    reply = httpx2.post(server.url + PATH, json={"num_steps": 3, "timeout_s": 5}, headers=headers)
    assert reply.status_code == 200
    assert reply.headers.get("content-encoding") == ("gzip" if packed else None)
    assert reply.content == TRACE
    assert reply.headers["x-profiled-steps"] == "3"
    assert server.engine.profiles == [(3, 5.0)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 101}, "num_steps"),
        ({"num_steps": "x"}, "num_steps"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 301}, "timeout_s"),
        ({"with_stack": True}, None),
    ],
)
def test_what_cannot_be_recorded_is_refused(server: Server, body: object, param: str | None) -> None:
    reply = server.post(PATH, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert server.engine.profiles == []


def test_no_steps_in_time(server: Server) -> None:
    server.engine.profiled = done(0)
    reply = server.post(PATH, {})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "no_steps")


@pytest.mark.parametrize(
    "header",
    ["x-forwarded-for: 127.0.0.1", "x-forwarded-for: 127.0.0.1, ::1", "Forwarded: for=127.0.0.1",
     "x-forwarded-host: a", "x-forwarded-proto: https", "Via: 1.1 p", "X-Real-IP: 127.0.0.1", "Origin: http://127.0.0.1:8000"],
)  # fmt: skip
def test_without_keys_nobody_from_elsewhere(server: Server, header: str) -> None:
    server.engine.profiled = done()
    reply = send(server, post(PATH, b"{}", header))
    assert reply.status == 403
    assert json.loads(reply.body)["error"]["code"] in ("not_local", "origin_not_allowed")
    assert server.engine.profiles == []


def test_with_keys_whoever_has_one() -> None:
    with serving(FakeEngine(), api_key=("k",)) as server:
        server.engine.profiled = done()
        assert send(server, post(PATH, b"{}")).status == 401
        assert send(server, post(PATH, b"{}", "x-api-key: k", "x-forwarded-for: 10.0.0.1")).status == 200


def test_a_client_that_leaves_ends_it(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(post(PATH, b"{}"))
        wait_until(lambda: len(server.engine.profiles) == 1)
        connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: server.engine.profiles[-1] == "cancelled")


# --- the two ends ------------------------------------------------------------------------------------------


def test_one_at_a_time_and_the_late_answer_is_dropped() -> None:
    sent: list[ToEngine] = []

    async def main() -> None:
        profiles = Profiles(sent.append)
        first = asyncio.create_task(profiles.record(2, 60))
        await asyncio.sleep(0)
        with pytest.raises(ProfileBusyError):
            await profiles.record(2, 60)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert sent == [Profile(1, 2), EndProfile(1, wanted=False)]
        second = asyncio.create_task(profiles.record(4, 60))
        await asyncio.sleep(0)
        profiles.deliver(Profiled(1, 2, b"late"))
        profiles.deliver(Profiled(2, 4, b"right"))
        assert (await second).trace == b"right"
        third = asyncio.create_task(profiles.record(1, 60))
        await asyncio.sleep(0)
        profiles.fail("gone")
        with pytest.raises(EngineUnavailableError, match="gone"):
            await third
        fourth = asyncio.create_task(profiles.record(1, 60))
        await asyncio.sleep(0)
        profiles.deliver(Profiled(4, 0, b"", "failed"))
        with pytest.raises(ProfileError):
            await fourth

    asyncio.run(main())


def test_when_time_is_up_what_there_is_is_asked_for() -> None:
    async def main() -> Profiled:
        def send(message: ToEngine) -> None:
            if message == EndProfile(1, wanted=True):
                asyncio.get_running_loop().call_soon(profiles.deliver, Profiled(1, 1, b"part"))

        profiles = Profiles(send)
        return await profiles.record(50, 0.01)

    assert asyncio.run(main()).num_steps == 1


class Parts:
    """What a profile puts ranges around."""

    def __init__(self) -> None:
        self.scheduler = self.runner = self.sampler = self
        self.info = type("Info", (), {"device": "cpu"})

    def schedule(self) -> None: ...
    def execute(self) -> None: ...
    def logits(self) -> None: ...
    def launch(self) -> None: ...
    def _collect(self) -> None: ...

    def step(self) -> None:
        self.schedule()
        self.execute()


def test_ranges_of_a_step_and_then_the_engine_is_as_it_was() -> None:
    sent: list[Any] = []
    engine: Any = Parts()
    before = dict(vars(engine))
    recorder = Profiling(engine, sent.append)
    recorder.take(Profile(7, 2))
    for num_requests in (0, 1, 0, 1):
        engine.step()
        recorder.stepped(num_requests)
    ((ask_id, num_steps, trace),) = [(one.ask_id, one.num_steps, one.trace) for one in sent]
    assert (ask_id, num_steps) == (7, 2)
    names = [event.get("name") for event in json.loads(gzip.decompress(trace))["traceEvents"]]
    assert names.count("gqa_serve.step") == names.count("gqa_serve.forward") == 4
    assert dict(vars(engine)) == before
    recorder.stepped(1)
    recorder.take(EndProfile(7, wanted=True))
    assert len(sent) == 1
    assert not torch.autograd._profiler_enabled()


def test_a_part_that_cannot_be_wrapped_leaves_the_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Any] = []
    engine: Any = Parts()
    monkeypatch.delattr(Parts, "launch")
    before = dict(vars(engine))
    Profiling(engine, sent.append).take(Profile(1, 2))
    assert [bool(one.error) for one in sent] == [True]
    assert dict(vars(engine)) == before
    assert not torch.autograd._profiler_enabled()


def test_a_profiler_that_does_not_start_leaves_the_engine_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(profiler: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("torch.profiler.profile.start", start)
    sent: list[Any] = []
    engine: Any = Parts()
    before = dict(vars(engine))
    Profiling(engine, sent.append).take(Profile(1, 2))
    assert [bool(one.error) for one in sent] == [True]
    assert dict(vars(engine)) == before


def test_a_profiler_that_fails_ends_the_profile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    recorder = Profiling(object(), sent.append)  # type: ignore[arg-type]
    recorder.take(Profile(1, 2))
    recorder.stepped(1)
    assert [(one.ask_id, one.num_steps, bool(one.error)) for one in sent] == [(1, 0, True)]
    assert not torch.autograd._profiler_enabled()
    assert profiling.logger.name == "gqa_serve.engine.profiling"
