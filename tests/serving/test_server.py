"""Binding, announcing, stopping."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from fly_jax.errors import ConfigError
from serving import ServerOptions, bind, run
from serving.server import TURN_SECONDS, ready_line
from tests.serving.live import HANG_SECONDS, eventually, live_server
from tests.serving.scripted_engine import REPLY, ScriptedEngine

ROOT = Path(__file__).resolve().parents[2]
SERVE_SCRIPTED = """
from serving import ServerOptions, run
from tests.serving.scripted_engine import ScriptedEngine

engine = ScriptedEngine()
run(lambda: engine, ServerOptions(port=0))
print("shut down" if engine.is_shut_down else "left running")
"""


def test_a_port_in_use_is_one_line_before_the_engine_is_started() -> None:
    def must_not_start() -> ScriptedEngine:
        raise AssertionError("the engine was started")

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is already in use: .*--port") as caught:
            run(must_not_start, ServerOptions(port=port))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_what_is_written_is_sent_at_once(host: str) -> None:
    """With TCP's delay on, the second part of every answer waits 40 ms for a client that keeps its connection."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=bind(host, 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            no_delay = await found
            writer.close()
        return no_delay

    try:
        assert asyncio.run(accepted())
    except ConfigError:
        pytest.skip(f"no {host} here")


def test_a_port_taken_while_the_engine_loads() -> None:
    """Both have bound it; the one that listens second is told."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]

    def load_slowly() -> ScriptedEngine:
        first.listen()
        return ScriptedEngine()

    with first, pytest.raises(ConfigError, match="already in use"):
        run(load_slowly, ServerOptions(port=port))


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "\ud800", "a" * 300])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        bind(host, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"port": -1},
        {"port": 65536},
        {"shutdown_timeout": -1},
        {"max_body_bytes": 0},
        {"api_keys": ("key", "")},
        {"admin_key": ""},
    ],
)
def test_bad_options(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        ServerOptions(**arguments)


def test_the_ready_line_can_be_pasted() -> None:
    line = ready_line("http://127.0.0.1:8000", 'it\'s "mine"', ServerOptions(api_keys=("hidden",)))
    words = shlex.split(line)
    assert words[:3] == ["ready:", "curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[-1])["model"] == 'it\'s "mine"'
    assert "hidden" not in line
    assert "\n" not in line


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_the_address_shown_works_here(host: str, shown: str) -> None:
    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with live_server(ScriptedEngine(), ServerOptions(host=host)) as server:
        assert server.url == f"http://{shown}:{server.handle.port}"
        assert server.http.get("/health").status_code == 200


def test_open_requests_may_end_before_the_server_does() -> None:
    engine = ScriptedEngine()
    with live_server(engine, ServerOptions(shutdown_timeout=HANG_SECONDS)) as server:
        body = {"prompt": "@endless @say x", "max_tokens": None, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as endless:
            lines = endless.iter_lines()
            next(lines)
            server.handle.request_stop()
            assert eventually(lambda: _refuses(server.handle.port))
            assert next(line for line in lines if line).startswith("data: ")
    assert len(engine.aborted) == 1


def test_what_runs_too_long_is_told_so() -> None:
    """Streams get an error event, others a 503; nobody's connection just breaks."""
    engine = ScriptedEngine()
    with live_server(engine, ServerOptions(shutdown_timeout=0)) as server:
        whole: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: whole.append(
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "@silent"}, timeout=HANG_SECONDS)
            )
        )
        thread.start()
        body = {"prompt": "@endless", "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as endless:
            lines = endless.iter_lines()
            next(lines)
            assert eventually(lambda: engine.running == 2)
            server.handle.request_stop()
            *_, last, done = [line for line in lines if line]
        thread.join(HANG_SECONDS)
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert (whole[0].status_code, whole[0].json()["error"]["code"]) == (503, "shutting_down")
    assert len(engine.aborted) == 2


def test_what_was_loaded_is_never_collected_again_and_turns_at_the_interpreter_are_short() -> None:
    script = """
import gc, os, signal, sys, threading
from serving import ServerOptions, run
from tests.serving.scripted_engine import ScriptedEngine

class Settled(ScriptedEngine):
    async def wait_failed(self):
        loaded = {id(each) for each in gc.get_objects()}
        print(gc.get_freeze_count() > 10_000, id(sys.modules) not in loaded, sys.getswitchinterval())
        os.kill(os.getpid(), signal.SIGTERM)

run(Settled, ServerOptions(port=0))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    assert f"True True {TURN_SECONDS}" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_an_orderly_shutdown(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SERVE_SCRIPTED]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        words = shlex.split(line)
        answer = httpx.post(words[2], json=json.loads(words[-1]), timeout=HANG_SECONDS)
        assert answer.json()["choices"][0]["text"] == REPLY
        process.send_signal(number)
        out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out, err) == (0, "shut down\n", "")


def test_a_server_whose_engine_has_failed_tells_its_clients_and_ends_with_an_error() -> None:
    command = [sys.executable, "-c", SERVE_SCRIPTED]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = shlex.split(process.stdout.readline())[2]
        body = {"prompt": "@fail-engine", "stream": True}
        with httpx.stream("POST", url, json=body, timeout=HANG_SECONDS) as stream:
            *_, last, done = [line for line in stream.iter_lines() if line]
        _, err = process.communicate(timeout=HANG_SECONDS)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], done) == ("engine_dead", "data: [DONE]")
    assert error["message"] == "the engine has stopped: it failed, and its log says why"
    assert process.returncode == 1
    assert "EngineDeadError: the engine has failed, so the server has ended" in err


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS).close()
    except OSError:
        return True
    return False
