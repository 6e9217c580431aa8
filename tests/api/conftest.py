"""Fixtures: a server with a scripted engine (one for all tests, reset for each), and an OpenAI client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from fake_engine import FakeEngine, Server, serving, wait_until


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    with serving(FakeEngine()) as running:
        yield running


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    shared_server.engine.reset()
    yield shared_server
    shared_server.engine.release.set()
    # Whatever a test did, nothing is left running: that is the API's promise, not the tests'.
    wait_until(lambda: shared_server.engine.num_running == 0)


@pytest.fixture
def engine(server: Server) -> FakeEngine:
    return server.engine


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened
