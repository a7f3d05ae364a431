"""The whole command with tiny sizes against a scripted server: what it sends, counts and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fly_jax.bench.__main__ import main
from fly_jax.bench.abuse_parts.phases import NAMES
from fly_jax.bench.abuse_parts.unfairness import URGENT
from tests.serving.live import LiveServer, live_server
from tests.serving.scripted_engine import WIDEST, ScriptedEngine

TINY = {
    "idle_seconds": 0.3,
    "after_seconds": 0.1,
    "settle_seconds": 0,
    "large_prompts": 3,
    "large_bytes": 100,
    "largest_bytes": 2000,
    "chat_messages": 5,
    "ids": 100,
    "held_connections": 4,
    "hold_seconds": 0.3,
    "connections": 6,
    "connections_seconds": 0.3,
    "other_streams": 2,
    "wide_rate": 20,
    "wide_seconds": 0.2,
    "waiting_requests": 5,
    "waiting_seconds": 0.3,
    "flood_requests": 2,
    "flood_seconds": 0.3,
}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with live_server(engine) as server:
        yield server


def abuse(server: LiveServer, folder: Path, *options: str) -> dict[str, Any]:
    """The result file's phases by name."""
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    given = ["abuse", "--url", server.url, "--prompt", "@endless", *tiny, *options]
    assert main([*given, "--save-result", "--result-dir", str(folder), "--label", "tiny"]) == 0
    result = json.loads((folder / "abuse-tiny.json").read_text())
    assert {"date", "fly_jax", "host"} <= result.keys()
    return {phase["name"]: phase for phase in result["phases"]}


@pytest.mark.slow
def test_every_phase_runs_and_counts_what_it_was_answered(
    server: LiveServer, engine: ScriptedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = abuse(server, tmp_path)
    assert tuple(phases) == NAMES
    answers = {name: phase["answers"] for name, phase in phases.items()}
    assert answers["idle"] == answers["streams"] == answers["afterwards"] == {}
    assert answers["large-texts"] == answers["tokenize"] == {"200": 3}
    assert answers["largest-text"] == {"400": 1}  # the context holds 512 tokens of a byte each
    assert answers["large-chat"] == answers["detokenize"] == answers["token-ids"] == {"200": 1}
    assert answers["wide-requests"] == {"200": 4}
    for name in ("slow-headers", "slow-bodies", "idle-connections"):
        assert sum(answers[name].values()) == phases[name]["figures"]["opened"] == 4
    assert sum(answers["many-connections"].values()) == phases["many-connections"]["figures"]["opened"] == 6
    assert sum(answers["waiting-places"].values()) == 5
    assert sum(answers["priority-flood"].values()) >= 2
    wide = phases["wide-requests"]["figures"]
    assert (wide["width"], wide["sent"], wide["started"]) == (WIDEST, 4, 4)
    assert sum(params.tensor_parallel_size == WIDEST for params in engine.params.values()) == 4
    seen = [phase["probes"] for phase in phases.values()]
    assert sum(each["streams"]["tokens"] for each in seen) > 0
    assert sum(each["health"]["answers"] for each in seen) > 0
    assert not any(each[who]["failures"] for each in seen for who in ("streams", "health", "short"))
    assert {phase["server"]["switches"] for phase in phases.values()} == {0}
    printed = capsys.readouterr().out
    assert all(printed.count(f"│ {name} ") == 2 for name in NAMES)


def test_only_the_flood_with_priority_asks_to_go_first(
    server: LiveServer, engine: ScriptedEngine, tmp_path: Path
) -> None:
    assert tuple(abuse(server, tmp_path, "--phases", "plain-flood")) == ("plain-flood",)
    assert {params.priority for params in engine.params.values()} == {0}
    assert tuple(abuse(server, tmp_path, "--phases", "priority-flood")) == ("priority-flood",)
    assert {params.priority for params in engine.params.values()} == {0, URGENT}


def test_a_phase_that_lasts_too_long_is_cut_off(server: LiveServer, tmp_path: Path) -> None:
    options = ("--phases", "idle-connections", "--hold-seconds", "600", "--phase-seconds", "0.2")
    [phase] = abuse(server, tmp_path, *options).values()
    assert phase["figures"] == {"cut_off_after_s": 0.2}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--phases", "idle", "nap"], "there is no such phase"),
        (["--ids", "-1"], "--ids must be at least 0, got -1"),
        (["--wide-rate", "0"], "--wide-rate must be above 0, got 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["abuse", "--url", "http://127.0.0.1:9", *given]) == 2
    assert said in capsys.readouterr().err


def test_the_server_or_the_model_is_given_but_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["abuse"]) == 2
    assert "--url or --self-hosted" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["abuse", "--url", "http://127.0.0.1:9", "--self-hosted", "model"])
    assert ended.value.code == 2
