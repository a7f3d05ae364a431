"""A command line that was written for vLLM: taken with a warning, or refused by name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fly_jax.cli.main import main
from fly_jax.cli.vllm_options import HARMLESS_SWITCHES, HARMLESS_VALUES, NEUTRAL, REFUSED
from serving import ServerOptions


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerOptions]:
    servers: list[ServerOptions] = []
    monkeypatch.setattr("serving.run", lambda _start, options: servers.append(options))
    return servers


def test_options_that_change_nothing_here_are_one_warning(
    tmp_path: Path, started: list[ServerOptions], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--trust-remote-code", "--enforce-eager", "--uvicorn-log-level", "warning", "--kv-cache-dtype=auto"]
    assert main(["serve", str(tmp_path), *arguments, "--port", "1234"]) == 0
    assert [server.port for server in started] == [1234]
    [record] = [record for record in caplog.records if record.name == "fly_jax.cli.vllm_options"]
    assert record.levelno == logging.WARNING
    assert record.message.endswith(": --trust-remote-code, --enforce-eager, --uvicorn-log-level, --kv-cache-dtype")


def test_each_harmless_option_and_each_neutral_value_is_taken(tmp_path: Path, started: list[ServerOptions]) -> None:
    arguments = [
        *HARMLESS_SWITCHES,
        *(f"{name}=1" for name in HARMLESS_VALUES),
        "--no-enforce-eager",
        "--no-enable-lora",
    ]
    arguments += ["--cuda-graph-sizes", "1", "2", "4"]
    arguments += [f"{name}={value}" for name, values in NEUTRAL.items() for value in values]
    assert main(["serve", str(tmp_path), *arguments]) == 0
    assert len(started) == 1


@pytest.mark.parametrize("name", [*REFUSED, "-q", "-pp"])
def test_an_option_that_would_change_something_is_refused_with_its_own_sentence(
    name: str, tmp_path: Path, started: list[ServerOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(tmp_path), name, "2"])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"{name} is vLLM's and not supported here: " in line
    assert not started


def test_none_of_them_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert not [name for name in (*HARMLESS_SWITCHES, *HARMLESS_VALUES, *REFUSED) if f"{name} " in shown]
