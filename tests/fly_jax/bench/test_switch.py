"""The benchmark of switches, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fly_jax.bench import switch
from fly_jax.bench.__main__ import main
from fly_jax.bench.switch import default_pairs
from fly_jax.layout import Layout
from fly_jax.outputs import SwitchStrategy
from tests.tiny_models import CASES, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_model(path, {**CASES["llama_gqa_tied"], "max_position_embeddings": 512})
    return path


@pytest.mark.slow
def test_every_strategy_is_measured_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["switch", str(folder), "--devices", "4", "--streams", "3", "--repeat", "1", "--switch", "dp4,tp4"]
    assert main([*given, "--save-result", "--result-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "4x1 -> 4" in printed
    result = json.loads((tmp_path / "switch.json").read_text())
    assert {"date", "jax", "device_kind", "model", "streams", "relayout_ms"} <= result.keys()
    assert result["weight_bytes_moved"] == 0
    by_strategy = {each["strategy"]: each["runs"][0] for each in result["switches"]}
    assert list(by_strategy) == ["migrate", "sequential", "soft_preempt", "hard_preempt"]
    for strategy, run in by_strategy.items():
        assert strategy in printed
        assert run["total_ms"] > 0
    migrate, sequential = by_strategy["migrate"], by_strategy["sequential"]
    hard, soft = by_strategy["hard_preempt"], by_strategy["soft_preempt"]
    assert (migrate["drain_ms"], migrate["tokens_recomputed"]) == (0, 0)
    assert migrate["requests_moved"] >= 1  # of three: on a busy machine the first two may have ended
    assert migrate["kv_bytes_moved"] > 0
    assert sequential["drain_ms"] > 0
    assert soft["drain_ms"] > 0
    assert sequential["kv_bytes_moved"] == soft["kv_bytes_moved"] == 0
    assert (hard["drain_ms"], hard["tokens_recomputed"]) == (0, 0)
    assert hard["requests_paused"] >= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--switch", "dp4"], "write FROM,TO"),
        (["--switch", "dp4,3+1"], "not an aligned power of two"),
        (["--streams", "0"], "must be at least 1"),
        (["--devices", "0"], "must be at least 1"),
        (["--devices", "3"], "--devices must be a power of two, got 3"),
        (["--devices", "6"], "--devices must be a power of two, got 6"),
    ],
)
def test_wrong_options_are_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["switch", "--devices", "4", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_place_that_cannot_hold_results_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: object) -> None:
        pytest.fail("an engine was started")

    monkeypatch.setattr(switch, "_Bench", measured)
    (tmp_path / "file").touch()
    for place in ("/dev/null/x", str(tmp_path / "file"), str(tmp_path / "file" / "deeper")):
        assert main(["switch", "--devices", "4", "--save-result", "--result-dir", place]) == 2
        error = capsys.readouterr().err
        assert f"{place} cannot be a folder: name another place" in error
        assert error.count("\n") == 1


def test_an_unknown_strategy_is_one_line_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["switch", "--strategy", "foo"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(strategy.value in error for strategy in SwitchStrategy)
    assert "SwitchStrategy" not in error


def test_the_help_states_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["switch", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"(default: {value})" in text for value in ("8", "16", "3", "0", "bench/results"))


@pytest.mark.parametrize(("devices", "count"), [(8, 14), (4, 8), (2, 2)])
def test_by_default_every_two_uniform_layouts_and_two_mixed_ones_are_measured(devices: int, count: int) -> None:
    pairs = default_pairs(devices)
    assert len(pairs) == len(set(pairs)) == count
    for source, target in pairs:
        assert source != target
        Layout.parse(source, devices)
        Layout.parse(target, devices)
    assert sum(len(set(text.split("+"))) > 1 for pair in pairs for text in pair) == (2 if devices >= 4 else 0)
