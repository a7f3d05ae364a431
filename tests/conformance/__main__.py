"""Real clients against one real server with the bundled model; see ``make conformance``."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.environments import FOLDER, Environment, NotInstalledError
from tests.conformance.processes import run
from tests.conformance.server import ServerError, served

PROGRAMS = Path(__file__).parent / "clients"
CLIENT_SECONDS = 240
INSTALLED_AT_ONCE = 2
LOG = FOLDER / "server.log"
LOG_LINES = 30
NOTE = "note: "
# All else that a client may read is the caller's: keys, addresses, proxies, caches.
KEPT_VARIABLES = ("PATH", "LANG", "LD_LIBRARY_PATH")
# What some look up elsewhere when they are imported.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@dataclass(frozen=True, slots=True)
class Client:
    """A program that ends with 0 if all is well, and the packages that it needs."""

    environment: Environment
    program: str


def _client(name: str, program: str, *requirements: str) -> Client:
    return Client(Environment(name, requirements), program)


CLIENTS = (
    _client("openai2", "openai_client.py", "openai>=2,<3"),
    _client("openai3", "openai_client.py", "openai>=3,<4"),
    _client("litellm", "litellm_client.py", "litellm>=1,<2"),
    _client("langchain_openai", "langchain_client.py", "langchain-openai>=1,<2"),
    _client("llm", "llm_client.py", "llm>=0.27,<1"),
    _client("lm_eval", "lm_eval_client.py", "lm_eval[api]>=0.4.9,<0.5", "transformers>=5,<6"),
    _client("schemathesis", "schemathesis_client.py", "schemathesis>=4,<5"),
)


def main(names: Sequence[str], clients: Sequence[Client] = CLIENTS) -> int:
    """Runs the clients of these names, or all; 0 if at least one ran and neither a client nor the server failed."""
    if unknown := set(names) - {client.environment.name for client in clients}:
        _say(f"there is no client {', '.join(sorted(unknown))}")
        return 2
    chosen = [client for client in clients if not names or client.environment.name in names]
    with ThreadPoolExecutor(INSTALLED_AT_ONCE) as pool:
        pythons = pool.map(_installed, chosen)
    installed = [(client, python) for client, python in zip(chosen, pythons, strict=True) if python is not None]
    failures = _failures(installed) if installed else ["no client ran"]
    for failure in failures:
        _say(f"FAILED: {failure}")
    _say(f"{len(installed)} clients ran, {len(chosen) - len(installed)} skipped, {len(failures)} failures")
    return 1 if failures else 0


def _installed(client: Client) -> Path | None:
    """The client's Python; None if it is to be skipped."""
    started = time.monotonic()
    try:
        python = client.environment.python()
    except NotInstalledError as error:
        _say(f"SKIPPED {client.environment.name}: {error}")
        return None
    if (seconds := time.monotonic() - started) > 1:
        _say(f"installed {client.environment.name} in {seconds:.0f} s")
    return python


def _failures(installed: Sequence[tuple[Client, Path]]) -> list[str]:
    failures = []
    try:
        with served(LOG) as url:
            for client, python in installed:
                started = time.monotonic()
                problem = _problem(python, client.program, url)
                if problem is not None:
                    failures.append(f"{client.environment.name}: {problem}")
                result = "PASSED" if problem is None else "FAILED"
                _say(f"{result} {client.environment.name} in {time.monotonic() - started:.0f} s")
    except ServerError as error:
        last = LOG.read_text().splitlines()[-LOG_LINES:]
        failures.append("\n".join((f"the server: {error}; the end of {LOG}:", *last)))
    return failures


def _problem(python: Path, program: str, url: str) -> str | None:
    """What the program said when it failed."""
    with tempfile.TemporaryDirectory() as home:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment = {**kept, **OFFLINE, "HOME": home, "TMPDIR": home}
        done = run([str(python), str(PROGRAMS / program), url], seconds=CLIENT_SECONDS, environment=environment)
    if done.code == 0:
        for line in done.output.splitlines():
            if line.startswith(NOTE):
                _say(line)
        return None
    ended = f"not done within {CLIENT_SECONDS} s" if done.code is None else f"exit code {done.code}"
    return f"{ended}\n{done.output}"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
