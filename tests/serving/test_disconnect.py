"""A client that leaves frees what it used, wherever its request was."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from tests.serving.live import HANG_SECONDS, LiveServer, eventually
from tests.serving.scripted_engine import ScriptedEngine


def aborted(engine: ScriptedEngine, request_id: str) -> int:
    return sum(request_id in name for name in engine.aborted)


def started(engine: ScriptedEngine, request_id: str) -> int:
    return sum(request_id in name for name in engine.params)


def post_raw(server: LiveServer, path: str, body: dict[str, Any], key: str = "none") -> socket.socket:
    """Sends a request and hands over the connection, to be closed at will."""
    content = json.dumps(body).encode()
    connection = socket.create_connection((server.handle.host, server.handle.port), timeout=HANG_SECONDS)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["@endless", "@silent"])
def test_leaving_aborts(server: LiveServer, engine: ScriptedEngine, prompt: str, stream: bool, n: int) -> None:
    """Before the first token (silent) and while they come (endless)."""
    request_id = f"leaver-{prompt[1:]}-{stream}-{n}-x"
    body = {"prompt": prompt, "max_tokens": None, "n": n, "stream": stream, "request_id": request_id}
    with post_raw(server, "/v1/completions", body) as connection:
        if stream and prompt == "@endless":
            assert connection.recv(64).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: started(engine, request_id) == n)
        assert aborted(engine, request_id) == 0
    assert eventually(lambda: aborted(engine, request_id) == n)


def test_leaving_a_chat_stream_halfway(server: LiveServer, engine: ScriptedEngine) -> None:
    stream = server.openai.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "@endless"}],
        stream=True,
        extra_body={"request_id": "chat-leaver"},
    )
    for count, _ in enumerate(stream):
        if count == 5:
            break
    stream.close()
    assert eventually(lambda: aborted(engine, "chat-leaver") == 1)


def test_leaving_in_the_middle_of_the_body(server: LiveServer, http: httpx.Client) -> None:
    with socket.create_connection((server.handle.host, server.handle.port), timeout=HANG_SECONDS) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        )
        connection.sendall(head + b'{"prompt":')
    assert eventually(lambda: http.get("/load").json() == {"server_load": 0})


def test_load_counts_what_runs(server: LiveServer, http: httpx.Client) -> None:
    assert eventually(lambda: http.get("/load").json() == {"server_load": 0})
    with post_raw(server, "/v1/completions", {"prompt": "@silent"}):
        assert eventually(lambda: http.get("/load").json() == {"server_load": 1})
    assert eventually(lambda: http.get("/load").json() == {"server_load": 0})


def test_finished_requests_are_not_aborted(server: LiveServer, engine: ScriptedEngine) -> None:
    for stream in (False, True):
        body = {"prompt": ["a", "b"], "stream": stream, "request_id": "stayer"}
        assert server.http.post("/v1/completions", json=body).status_code == 200
    assert aborted(engine, "stayer") == 0
