"""From options to a listening server and back: bind, serve, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from fly_jax.errors import ConfigError, EngineDeadError
from serving.app import create_app
from serving.connections import ACCEPTED_AT_ONCE, BACKLOG
from serving.engine_client import EngineClient
from serving.http_protocol import HttpConfig
from serving.options import ServerOptions

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# For requests that were cut off at the end of the shutdown time, to say so to their clients.
LAST_WORDS_SECONDS = 1.0
# For which a thread keeps the interpreter while another waits for it; 0.0005 gave 3 to 11 % more tokens than 0.005.
TURN_SECONDS = 0.0005


class HttpServer(uvicorn.Server):
    """Uvicorn, with signals that end in a return instead of a re-raised signal: the engine is shut down after it."""

    def __init__(
        self, config: uvicorn.Config, address: tuple[str, int], on_ready: Callable[[HttpServer], None] | None
    ) -> None:
        super().__init__(config)
        self.host, self.port = address
        self._on_ready = on_ready

    @property
    def url(self) -> str:
        """A URL that works on this machine, also when the server listens on all addresses."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def request_stop(self) -> None:
        """Stops accepting and lets open requests end; may be called from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
            # To asyncio the backlog is also how many it accepts before it does anything else.
            for sock in sockets or ():
                sock.listen(BACKLOG)
        except OSError as error:
            # Two processes may both have bound the port before either listened.
            raise _cannot_listen(self.host, self.port, error) from error
        if self._on_ready is not None:
            self._on_ready(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=LAST_WORDS_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """The first signal asks for an orderly end, the second for an immediate one."""
        self.force_exit = self.should_exit
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Takes the port before anything slow is done; connections are refused until the server is ready.

    Raises:
        ConfigError: the address is unknown, not allowed or in use.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        # Only where its protocol is named does asyncio send what is written at once: otherwise the second part of an
        # answer waits for the client's acknowledgement of the first, which takes 40 ms.
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    try:
        # Lets a restarted server have its port back while old connections linger in TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from error
    return sock


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> ConfigError:
    if isinstance(error, UnicodeError):
        return ConfigError(f"{host!a} is not a host name; check --host")
    match error.errno:
        case errno.EADDRINUSE:
            return ConfigError(
                f"port {port} on {host} is already in use: stop what listens there or choose another --port"
            )
        case errno.EACCES:
            return ConfigError(f"not allowed to listen on port {port}: choose a --port above 1023")
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}; check --host")


async def serve(
    engine: EngineClient,
    options: ServerOptions,
    sock: socket.socket,
    *,
    on_ready: Callable[[HttpServer], None] | None = None,
) -> None:
    """Serves the engine on a bound socket until a stop is asked for; the engine is the caller's to shut down.

    Raises:
        ConfigError: the port was taken between binding and listening.
    """
    app = create_app(engine, options)
    config = HttpConfig(
        app,
        options.connections,
        app.state.server.connections,
        backlog=ACCEPTED_AT_ONCE,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Uvicorn would believe X-Forwarded-For from loopback peers, and the admin guard needs the real peer.
        proxy_headers=False,
        timeout_graceful_shutdown=options.shutdown_timeout,
    )
    port = sock.getsockname()[1]
    server = HttpServer(config, (options.host, port), on_ready)
    watcher = asyncio.create_task(_stop_when_failed(engine, server))
    try:
        await server.serve(sockets=[sock])
    finally:
        watcher.cancel()
        app.state.server.large_bodies.close()


async def _stop_when_failed(engine: EngineClient, server: HttpServer) -> None:
    await engine.wait_failed()
    server.request_stop()


def run(start_engine: Callable[[], EngineClient], options: ServerOptions) -> None:
    """Binds the port, starts the engine, serves until SIGINT or SIGTERM, then shuts the engine down.

    ``start_engine`` is called before there is an event loop, so that loading can be interrupted.

    Raises:
        ConfigError: the port cannot be had; raised before the engine is started.
        EngineDeadError: the engine failed by itself, or was stuck at the end; clients have been told and the server has
            ended.
        Whatever ``start_engine`` raises.
    """
    sock = bind(options.host, options.port)
    try:
        engine = start_engine()
        _stall_nobody()
        asyncio.run(_serve_and_shut_down(engine, options, sock))
    finally:
        sock.close()


def _stall_nobody() -> None:
    """Settings of the interpreter for a process that is a server and nothing else.

    What was loaded lives as long as the server, and each collection of it all would stop everybody for 0.2 s. The
    engine's thread and the event loop need the interpreter by turns: Python's turns of 5 ms are as long as a step.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(TURN_SECONDS)


async def _serve_and_shut_down(engine: EngineClient, options: ServerOptions, sock: socket.socket) -> None:
    def announce(server: HttpServer) -> None:
        model_name = options.model_names(engine)[0]
        sys.stdout.write(ready_line(server.url, model_name, options) + "\n")
        sys.stdout.flush()

    try:
        await serve(engine, options, sock, on_ready=announce)
    finally:
        await engine.shutdown()
    if engine.has_failed:
        raise EngineDeadError("the engine has failed, so the server has ended: the log above says why")


def ready_line(url: str, model_name: str, options: ServerOptions) -> str:
    """One line to paste; a key is named, never shown."""
    body = json.dumps({"model": model_name, "prompt": "Once upon a time", "max_tokens": 32})
    key = ' -H "Authorization: Bearer $API_KEY"' if options.api_keys else ""
    json_header = "-H 'Content-Type: application/json'"
    return f"ready: curl {url}/v1/completions {json_header}{key} -d {shlex.quote(body)}"
