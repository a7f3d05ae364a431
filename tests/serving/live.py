"""A real server on a free port, in a thread of its own, for any engine."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import openai

from serving import EngineClient, ServerOptions, bind, serve
from serving.server import HttpServer

HANG_SECONDS = 120  # only something that waits for ever takes this long


@dataclass(frozen=True)
class LiveServer:
    url: str
    options: ServerOptions
    http: httpx.Client
    openai: openai.OpenAI
    handle: HttpServer


@contextmanager
def live_server(engine: EngineClient, options: ServerOptions | None = None) -> Iterator[LiveServer]:
    """Serves ``engine`` until the block ends; the engine is left running."""
    options = dataclasses.replace(options or ServerOptions(shutdown_timeout=5), port=0)
    sock = bind(options.host, options.port)
    ready = threading.Event()
    handles: list[HttpServer] = []
    failures: list[BaseException] = []

    def on_ready(server: HttpServer) -> None:
        handles.append(server)
        ready.set()

    def main() -> None:
        try:
            asyncio.run(serve(engine, options, sock, on_ready=on_ready))
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="live-server", daemon=True)
    thread.start()
    assert ready.wait(HANG_SECONDS)
    if failures:
        raise failures[0]
    [handle] = handles
    key = options.api_keys[0] if options.api_keys else "none"
    client = openai.OpenAI(base_url=f"{handle.url}/v1", api_key=key, max_retries=0, timeout=HANG_SECONDS)
    try:
        with httpx.Client(base_url=handle.url, timeout=HANG_SECONDS) as http, client:
            yield LiveServer(handle.url, options, http, client, handle)
    finally:
        handle.request_stop()
        thread.join(HANG_SECONDS)
        sock.close()
    assert not thread.is_alive()
    if failures:
        raise failures[0]


def eventually(condition: Callable[[], bool], timeout: float = HANG_SECONDS) -> bool:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
