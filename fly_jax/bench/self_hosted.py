"""A server of our own, as a child process that lasts as long as a benchmark."""

from __future__ import annotations

import contextlib
import json
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

import httpx

from fly_jax.errors import ConfigError

START_TIMEOUT_SECONDS = 1800
STOP_TIMEOUT_SECONDS = 60
POLL_SECONDS = 0.2
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# Given by us; a second value would go before ours and the server would not be found.
OWN_ARGUMENTS = ("--host", "--port", "--api-key")


def split_server_arguments(text: str) -> list[str]:
    """Arguments of ``fly-jax serve``, as a shell would read them.

    Raises:
        ConfigError: an open quote, or an argument that the benchmark has to choose.
    """
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--server-args cannot be read: {error}, in {text!r}") from error
    for argument in arguments:
        if argument.partition("=")[0] in OWN_ARGUMENTS:
            raise ConfigError(f"--server-args must leave out {argument}: the benchmark chooses where its server is")
    return arguments


def vocab_size(model: Path) -> int:
    """From the model folder's config.json.

    Raises:
        ConfigError: there is none, or it does not say.
    """
    path = model / "config.json"
    try:
        return int(json.loads(path.read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not give a vocab_size ({error!r}): is {model} a model folder?") from error


@dataclass(frozen=True, slots=True)
class HostedServer:
    """A server of our own that is ready."""

    url: str
    pid: int


@contextlib.contextmanager
def self_hosted(model: Path, arguments: list[str]) -> Iterator[str]:
    """The URL of :func:`hosted`, whose messages go to standard error."""
    with hosted(model, arguments) as server:
        yield server.url


@contextlib.contextmanager
def hosted(
    model: Path, arguments: list[str], *, output: TextIO | None = None, open_files: int | None = None
) -> Iterator[HostedServer]:
    """Starts ``fly-jax serve MODEL`` on a free port, yields it when it is ready, stops it at the end.

    It has a session of its own, so that a Ctrl-C in the terminal reaches only the benchmark, which stops it when the
    partial results are in.

    Args:
        output: file for its messages; None: standard error.
        open_files: most that it may have; None: as many as this process.

    Raises:
        ConfigError: the server ended, or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fly_jax", "serve", str(model), "--port", str(port), *arguments]
    url = f"http://127.0.0.1:{port}"
    streams: dict[str, Any] = {"stdout": sys.stderr if output is None else output, "stderr": output}
    with stopping_on_signals(), started(command, open_files, streams) as process:
        try:
            _wait_until_ready(process, url)
            yield HostedServer(url, process.pid)
        finally:
            _stop(process)


def started(command: list[str], open_files: int | None, streams: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A child inherits this process's limit, which is its own again afterwards."""
    own, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files is not None and open_files < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, hard))
    try:
        return subprocess.Popen(command, start_new_session=True, **streams)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (own, hard))


def _wait_until_ready(process: subprocess.Popen[Any], url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    with httpx.Client(trust_env=False) as http:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ConfigError(
                    f"the server ended with code {process.returncode} before it was ready: see its message, and "
                    "check --self-hosted and --server-args"
                )
            with contextlib.suppress(httpx.TransportError):
                if http.get(f"{url}/health").is_success:
                    return
            time.sleep(POLL_SECONDS)
    raise ConfigError(f"the server was not ready after {START_TIMEOUT_SECONDS} s")


def _stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """A benchmark that is told to end, or whose terminal is gone, must not leave its server behind.

    Within, such a signal raises SystemExit with the code that a shell would give. One that is ignored, as under nohup,
    stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in ENDING_SIGNALS}
    handled = {each: previous for each, previous in before.items() if previous is not signal.SIG_IGN}
    for each in handled:
        signal.signal(each, _exit)
    try:
        yield
    finally:
        for each, previous in handled.items():
            signal.signal(each, previous)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    # A shell passes a hangup on to its jobs, which then get it twice: the second must not end the stopping.
    for each in ENDING_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)
