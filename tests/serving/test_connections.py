from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fly_jax.errors import ConfigError
from serving import ServerOptions
from serving.connections import RESERVED, ConnectionCounts, ConnectionLimits, Phase
from serving.http_protocol import HttpConfig
from tests.serving.live import HANG_SECONDS, LiveServer, eventually, live_server
from tests.serving.scripted_engine import ScriptedEngine

SOON = 0.05
NEVER = float(HANG_SECONDS)
PATIENT = ConnectionLimits(keep_alive=NEVER, headers=NEVER, body=NEVER, reading=NEVER, reserved=NEVER)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Connection:
    def __init__(self, server: LiveServer) -> None:
        self.socket = socket.create_connection((server.handle.host, server.handle.port), timeout=HANG_SECONDS)

    def send(self, data: bytes) -> Connection:
        self.socket.sendall(data)
        return self

    def rest(self) -> bytes:
        """All that comes until the server closes."""
        parts = []
        while part := self.socket.recv(65536):
            parts.append(part)
        self.socket.close()
        return b"".join(parts)


@contextmanager
def serving_with(**limits: Any) -> Iterator[tuple[LiveServer, ConnectionCounts]]:
    options = ServerOptions(shutdown_timeout=5, connections=ConnectionLimits(**(_fields(PATIENT) | limits)))
    with live_server(ScriptedEngine(), options) as server:
        config = server.handle.config
        assert isinstance(config, HttpConfig)
        yield server, config.counts
    assert config.counts.open == len(config.reserved) == 0


def _fields(limits: ConnectionLimits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in ConnectionLimits.__slots__}


def error_of(answer: bytes) -> tuple[bytes, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], json.loads(body)["error"]


def test_a_connection_that_never_speaks_is_closed_without_a_word() -> None:
    with serving_with(headers=SOON) as (server, counts):
        assert Connection(server).rest() == b""
        assert counts.timed_out == {Phase.HEADERS: 1, Phase.BODY: 0, Phase.READING: 0}


@pytest.mark.parametrize("start", [b"G", HEAD])
@pytest.mark.parametrize("is_first", [True, False])
def test_headers_that_do_not_end_are_told_so(start: bytes, is_first: bool) -> None:
    with serving_with(headers=SOON if is_first else 2.0) as (server, counts):
        connection = Connection(server)
        if not is_first:
            connection.send(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            while not connection.socket.recv(65536).endswith(b"}"):
                pass
        line, error = error_of(connection.send(start).rest())
        assert line == b"HTTP/1.1 408 Request Timeout"
        assert (error["code"], error["type"]) == ("request_timeout", "invalid_request_error")
        assert error["message"] == f"the request's headers took longer than {0.05 if is_first else 2:g} s: send faster"
        assert counts.timed_out[Phase.HEADERS] == 1


def test_a_body_that_does_not_end_is_told_so() -> None:
    with serving_with(body=SOON) as (server, counts):
        line, error = error_of(Connection(server).send(HEAD + b"Content-Length: 100000\r\n\r\n{").rest())
        assert line == b"HTTP/1.1 408 Request Timeout"
        assert error["message"] == "the request's body took longer than 0.05 s: send faster"
        assert counts.timed_out[Phase.BODY] == 1


def test_no_limit_cuts_an_answer_that_takes_its_time() -> None:
    with serving_with(headers=0.5, body=SOON, keep_alive=SOON, reading=SOON) as (server, counts):
        body = {"prompt": "@endless", "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            started, chunks = time.monotonic(), 0
            for line in answer.iter_lines():
                chunks += line.startswith("data: {")
                if time.monotonic() - started > 1.0:
                    break
        assert chunks > 1
        assert not counts.timed_out.total()


def test_beyond_the_limit_only_health_is_answered() -> None:
    with serving_with(connections=2) as (server, counts):
        held = [Connection(server) for _ in range(2)]
        assert eventually(lambda: counts.open == 2)
        request = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
        line, error = error_of(Connection(server).send(request % b"/v1/models").rest())
        assert line == b"HTTP/1.1 503 Service Unavailable"
        assert (error["code"], error["message"]) == ("too_many_connections", "too many connections: try later")
        assert Connection(server).send(request % b"/health").rest().startswith(b"HTTP/1.1 200 OK")
        assert counts.refused == 1
        held.pop().socket.close()
        assert eventually(lambda: counts.open == 1)
        answer = server.http.get("/metrics").text
        assert 'fly:http_connections{model_name="scripted"} 2.0' in answer
        assert 'fly:http_connections_refused_total{model_name="scripted"} 1.0' in answer
        assert 'fly:http_connections_timed_out_total{model_name="scripted",phase="headers"} 0.0' in answer
        held.pop().socket.close()


def test_silent_connections_beyond_the_limit_give_way_to_those_that_ask() -> None:
    with serving_with(connections=1) as (server, counts):
        held = [Connection(server) for _ in range(1 + RESERVED)]
        assert eventually(lambda: counts.open == 1 + RESERVED)
        health = Connection(server).send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert health.rest().startswith(b"HTTP/1.1 200 OK")
        assert held.pop(1).rest() == b""  # the oldest of those beyond the limit
        assert counts.refused == 1
        for connection in held:
            connection.socket.close()


def test_connections_beyond_the_limit_are_closed_sooner() -> None:
    with serving_with(connections=1, reserved=SOON) as (server, counts):
        held = Connection(server)
        assert eventually(lambda: counts.open == 1)
        assert Connection(server).rest() == b""
        assert counts.open == 1
        held.socket.close()


def test_there_are_never_more_connections_than_files() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1200))\n"
        "from serving import ConnectionLimits\n"
        "print(ConnectionLimits().places(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "304 (1200, 1200)\n"
    assert "at most 304 connections, not the 2048 of --limit-concurrency" in done.stderr
    assert "they need 2944 open files and this process may have 1200: raise ulimit -n" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"connections": 0}, "limit_concurrency must be at least 1, got 0"),
        ({"body": 0.0}, "timeout_body must be more than 0 seconds, got 0.0"),
        ({"headers": float("nan")}, "timeout_headers must be more than 0 seconds, got nan"),
        ({"keep_alive": float("inf")}, "timeout_keep_alive must be more than 0 seconds, got inf"),
    ],
)
def test_limits_that_are_none_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConnectionLimits(**wrong)  # type: ignore[arg-type]
