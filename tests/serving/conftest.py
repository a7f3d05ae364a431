from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from serving import ServerOptions, create_app
from tests.serving.live import LiveServer, live_server
from tests.serving.scripted_engine import ScriptedEngine


@pytest.fixture(scope="session")
def engine() -> ScriptedEngine:
    """Shared: prompts script it, and what it records is told apart by request id."""
    return ScriptedEngine()


@pytest.fixture(scope="session")
def server(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with live_server(engine) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return server.openai


@pytest.fixture
def http(server: LiveServer) -> httpx.Client:
    return server.http


@pytest.fixture
def in_process() -> Callable[..., httpx.AsyncClient]:
    """A client of an application without sockets, from any peer address."""

    def make(
        engine: ScriptedEngine | None = None,
        options: ServerOptions | None = None,
        *,
        peer: str = "127.0.0.1",
        host: str = "localhost:8000",
    ) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(create_app(engine or ScriptedEngine(), options), client=(peer, 12345))
        return httpx.AsyncClient(transport=transport, base_url=f"http://{host}")

    return make
