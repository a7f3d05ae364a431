"""The report of a GPU: its phases, and what one that goes wrong does to the others."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from fly_jax.bench.__main__ import main
from fly_jax.bench.gpu import SUMMARY_LINES, Phase, phases, run_phases, summary
from fly_jax.errors import ConfigError

PROGRAM = ("timeit", "-n", "1", "-r", "1")


@pytest.mark.slow
def test_a_phase_that_hangs_or_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    todo = [
        Phase("hangs", 1.0, (*PROGRAM, "import time; time.sleep(3600)")),
        Phase("fails", 20.0, (*PROGRAM, "raise SystemExit(3)")),
        Phase("goes well", 20.0, (*PROGRAM, "pass")),
    ]
    outcomes = run_phases(todo, tmp_path, 123.0)
    assert [each.state for each in outcomes] == ["out of time", "failed", "done"]
    assert "loop" in outcomes[2].said[-1]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["name"] for each in written["phases"]] == ["hangs", "fails", "goes well"]


def test_a_phase_stands_in_for_another_only_where_that_failed(tmp_path: Path) -> None:
    well, badly = (*PROGRAM, "pass"), (*PROGRAM, "raise SystemExit(3)")
    todo = [
        Phase("good", 1.0, well),
        Phase("not needed", 1.0, well, instead_of="good"),
        Phase("bad", 1.0, badly),
        Phase("needed", 1.0, well, instead_of="bad"),
    ]
    outcomes = run_phases(todo, tmp_path, 120.0)
    assert [(each.name, each.state) for each in outcomes] == [("good", "done"), ("bad", "failed"), ("needed", "done")]


def test_what_a_phase_had_found_outlives_it(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    code = (
        "from fly_jax.bench.gpu_parts.records import Records; from pathlib import Path\n"
        f"Records(Path({str(path)!r})).add('first', batch=1); open({str(path)!r}, 'a').write('{{\"li'); import os\n"
        "os.abort()"
    )
    (outcome,) = run_phases([Phase("cut", 1.0, (*PROGRAM, code), result=path.name)], tmp_path, 60.0)
    assert outcome.state == "failed"
    assert outcome.found == [{"line": "first", "batch": 1}]


def test_without_a_gpu_it_ends_after_the_first_phase_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "first.jsonl"
    code = f"open({str(path)!r}, 'w').write('{{\"platform\": \"cpu\"}}\\n')"
    todo = [Phase("first", 1.0, (*PROGRAM, code), result=path.name), Phase("second", 1.0, (*PROGRAM, "pass"))]
    with pytest.raises(ConfigError, match="jax finds no GPU here but cpu: --toy runs toy sizes on it"):
        run_phases(todo, tmp_path, 60.0, needs_gpu=True)
    assert [each["name"] for each in json.loads((tmp_path / "gpu.json").read_text())["phases"]] == ["first"]


def test_the_summary_of_all_phases_has_twenty_lines_at_most(tmp_path: Path) -> None:
    for toy in (True, False):
        todo = phases(tmp_path, toy=toy)
        assert sum(phase.lines for phase in todo if phase.instead_of is None) <= SUMMARY_LINES


@pytest.mark.slow
def test_a_dry_run_with_toy_sizes_ends_well_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = main(["gpu", "--out", str(out), "--toy", "--seconds", "900"])
    written = json.loads((out / "gpu.json").read_text())["phases"]
    states = {each["name"]: each["state"] for each in written}
    assert code == 0, states
    assert list(states) == [phase.name for phase in phases(out, toy=True) if phase.instead_of is None]
    found = {each["name"]: each["found"] for each in written}
    (compared,) = (each for each in found["host"] if "same_tokens" in each)
    assert compared["same_tokens"] == compared["tokens"] > 0
    assert {each["views"] for each in found["engine"] if "views" in each} == {2 + 4 + 8}
    assert [each["batch"] for each in found["model"] if "tpot_ms" in each] == [1, 2]
    assert all(0 < each["host_share"] <= 1 for each in found["model"] if "tpot_ms" in each)
    (trace,) = (each for each in found["model"] if "kernels" in each)
    assert 0 < sum(trace["kernels"].values()) <= trace["seconds"] * (1 + 1e-9)
    assert {(row["kind"], row["tp"]) for row in found["attention"]["rows"]} == set(
        product(("decode", "prefill"), (1, 8))
    )
    assert [each["said"] for each in written if each["name"].startswith("oracle")] == [["1 passed, 0 not"]] * 2
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "log.txt", "summary.txt"]
    assert len(written) <= len((out / "summary.txt").read_text().splitlines()) <= SUMMARY_LINES


@pytest.mark.slow
def test_no_web_package_is_imported() -> None:
    bench = ("gpu", "gpu_parts.engine", "gpu_parts.model", "gpu_parts.trace", "kernel_tuning", "latency")
    modules = ", ".join(("fly_jax.llm", "fly_jax.engine.loader", *(f"fly_jax.bench.{name}" for name in bench)))
    check = (
        f"import sys, {modules}\nprint({{'fastapi', 'uvicorn', 'pydantic', 'starlette', 'serving'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_summary_says_how_each_phase_ended_and_why_one_failed(tmp_path: Path) -> None:
    todo = [
        Phase("fails", 1.0, (*PROGRAM, "raise RuntimeError('no such thing')")),
        Phase("well", 1.0, (*PROGRAM, "pass")),
    ]
    fails, well = summary(run_phases(todo, tmp_path, 60.0))
    assert fails.startswith("fails          failed")
    assert fails.endswith("RuntimeError: no such thing")
    assert well.startswith("well           done")
