"""Real clients against one real server with the bundled model; see ``make conformance``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.environments import Environment, NotInstalledError

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "clients"
CLIENT_SECONDS = 300
READY = "ready: curl "


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
    _client("litellm", "litellm_client.py", "litellm"),
    _client("langchain_openai", "langchain_client.py", "langchain-openai"),
    _client("llm", "llm_client.py", "llm"),
    _client("lm_eval", "lm_eval_client.py", "lm_eval[api]", "transformers"),
    _client("schemathesis", "schemathesis_client.py", "schemathesis>=4"),
)


def main(names: Sequence[str]) -> int:
    """Runs the clients of these names, or all; 0 if none failed and at least one ran."""
    chosen = [client for client in CLIENTS if not names or client.environment.name in names]
    passed, failed, skipped = [], [], []
    with _server() as url:
        for client in chosen:
            name, started = client.environment.name, time.monotonic()
            try:
                python = client.environment.python()
            except NotInstalledError as error:
                skipped.append(name)
                _say(f"SKIPPED {name}: {error}")
                continue
            problem = _problem(python, client.program, url)
            (passed if problem is None else failed).append(name)
            result = "PASSED" if problem is None else "FAILED"
            _say(f"{result} {name} in {time.monotonic() - started:.0f} s{'' if problem is None else f': {problem}'}")
    if not (passed or failed):
        _say("no client ran")
    _say(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    return 0 if passed and not failed else 1


def _problem(python: Path, program: str, url: str) -> str | None:
    """What the program said when it failed."""
    command = [str(python), str(PROGRAMS / program), url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=CLIENT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done within {CLIENT_SECONDS} s"
    return None if done.returncode == 0 else f"exit code {done.returncode}\n{done.stdout}{done.stderr}"


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """The address of a server with the bundled model on a free port, until the block ends."""
    command = [sys.executable, "-m", "fly_jax", "serve", str(ROOT / "checkpoints" / "demo" / "model")]
    command += [
        "--devices",
        "4",
        "--layouts",
        "2+2",
        "--policy",
        "static",
        "--port",
        "0",
        "--served-model-name",
        "demo",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(READY):
                yield line.removeprefix(READY).partition("/v1")[0]
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()} before it was ready")
    finally:
        process.terminate()
        process.wait()


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
