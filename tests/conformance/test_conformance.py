"""The run itself: what is installed again, what is skipped, and when it fails. No client is installed here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import __main__ as conformance
from tests.conformance import environments
from tests.conformance.__main__ import Client
from tests.conformance.environments import Environment, NotInstalledError
from tests.conformance.processes import Finished, run
from tests.conformance.server import ServerError

NO_CONNECTION = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NameResolutionError'
ERROR: Could not find a version that satisfies the requirement one (from versions: none)
ERROR: No matching distribution found for one
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements of each environment that is made."""
    made: list[str] = []

    def make(command: Sequence[str], **_: Any) -> Finished:
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        else:
            made.append(command[-1])
        return Finished(0, "")

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "run", make)
    return made


def test_an_environment_is_made_once(commands: list[str]) -> None:
    python = Environment("client", ("one",)).python()
    assert python == Environment("client", ("one",)).python()
    assert commands == ["one"]


def test_it_is_made_again_for_other_requirements_another_python_and_a_broken_link(
    commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Environment("client", ("one",)).python()
    python = Environment("client", ("two",)).python()
    monkeypatch.setattr(sys, "version", "another")
    Environment("client", ("two",)).python()
    python.unlink()
    Environment("client", ("two",)).python()
    assert commands == ["one", "two", "two", "two"]


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (Finished(1, NO_CONNECTION), "No matching distribution found for one; WARNING: Retrying .*NameResolutionError"),
        (Finished(1, ""), "no reason given"),
        (Finished(None, "downloading"), "not installed within 300 s"),
    ],
)
def test_what_is_not_installed_says_why_and_is_tried_again(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, done: Finished, reason: str
) -> None:
    make = environments.run

    def fail(command: Sequence[str], *, seconds: float) -> Finished:
        return done if "pip" in command else make(command, seconds=seconds)

    with monkeypatch.context() as offline:
        offline.setattr(environments, "run", fail)
        with pytest.raises(NotInstalledError, match=reason):
            Environment("client", ("one",)).python()
    Environment("client", ("one",)).python()
    assert commands == ["one"]


class Missing(Environment):
    def python(self) -> Path:
        raise NotInstalledError("no network")


class Here(Environment):
    def python(self) -> Path:
        return Path(sys.executable)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of clients' programs, and a server that is none."""

    @contextmanager
    def served(_log: Path) -> Iterator[str]:
        yield "http://none"

    monkeypatch.setattr(conformance, "PROGRAMS", tmp_path)
    monkeypatch.setattr(conformance, "served", served)
    return tmp_path


@pytest.mark.parametrize(
    ("clients", "code"),
    [
        ([Client(Missing("a", ()), "right.py")], 1),
        ([Client(Here("a", ()), "right.py"), Client(Missing("b", ()), "right.py")], 0),
        ([Client(Here("a", ()), "right.py"), Client(Here("b", ()), "wrong.py")], 1),
    ],
)
def test_it_fails_if_a_client_failed_or_none_ran(
    programs: Path, capsys: pytest.CaptureFixture[str], clients: list[Client], code: int
) -> None:
    (programs / "right.py").write_text("import sys; assert sys.argv[1] == 'http://none'; print('note: seen')")
    (programs / "wrong.py").write_text("raise SystemExit('expected 1, got 2')")
    assert conformance.main([], clients) == code
    told = capsys.readouterr().out
    for client in clients:
        if isinstance(client.environment, Missing):
            assert f"SKIPPED {client.environment.name}: no network" in told
        elif client.program == "wrong.py":
            assert "FAILED: b: exit code 1\nexpected 1, got 2" in told
        else:
            assert "note: seen\nPASSED a" in told


def test_a_server_that_has_failed_fails_the_run_with_the_end_of_its_log(
    programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def served(log: Path) -> Iterator[str]:
        log.write_text("first\n" + "more\n" * 28 + "why\n")
        yield "http://none"
        raise ServerError("it ended by itself with 1")

    (programs / "right.py").touch()
    monkeypatch.setattr(conformance, "served", served)
    monkeypatch.setattr(conformance, "LOG", programs / "log")
    assert conformance.main([], [Client(Here("a", ()), "right.py")]) == 1
    assert "first\nmore\n" in (told := capsys.readouterr().out)
    assert "more\nwhy\n1 clients ran, 0 skipped, 1 failures" in told


def test_a_client_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["openai4"]) == 2
    assert "there is no client openai4" in capsys.readouterr().out


def test_a_program_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    """Its child holds a named pipe, whose end comes only when the child is gone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = f"import time; pipe = open({str(pipe)!r}, 'w'); time.sleep(3600)"
    program = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert run([sys.executable, "-c", program], seconds=2).code is None
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)
