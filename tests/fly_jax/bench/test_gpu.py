"""The report of a GPU: its phases, and what one that goes wrong does to the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fly_jax.bench.__main__ import main
from fly_jax.bench.gpu import SUMMARY_LINES, Phase, phases, run_phases, summary

PROGRAM = ("timeit", "-n", "1", "-r", "1")


def test_a_phase_that_hangs_or_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    todo = [
        Phase("hangs", 1.0, (*PROGRAM, "import time; time.sleep(3600)")),
        Phase("fails", 20.0, (*PROGRAM, "raise SystemExit(3)")),
        Phase("goes well", 20.0, (*PROGRAM, "print('ended')")),
    ]
    outcomes = run_phases(todo, tmp_path, 123.0)
    assert [each.state for each in outcomes] == ["out of time", "failed", "done"]
    assert "ended" in outcomes[2].said
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["name"] for each in written["phases"]] == ["hangs", "fails", "goes well"]


def test_the_summary_of_all_phases_has_twenty_lines_at_most(tmp_path: Path) -> None:
    assert len(phases(tmp_path, toy=False)) <= SUMMARY_LINES


def test_a_dry_run_with_toy_sizes_ends_well_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = main(["gpu", "--out", str(out), "--toy", "--seconds", "900"])
    written = json.loads((out / "gpu.json").read_text())["phases"]
    states = {each["name"]: each["state"] for each in written}
    assert code == 0, states
    assert states.keys() == {phase.name for phase in phases(out, toy=True)}
    assert all(each["found"]["avg_latency"] > 0 for each in written if each["name"].startswith(("engine", "model")))
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "log.txt", "summary.txt"]
    assert len((out / "summary.txt").read_text().splitlines()) == len(written)


def test_no_web_package_is_imported() -> None:
    check = (
        "import sys, fly_jax.bench.gpu, fly_jax.llm, fly_jax.loader, fly_jax.bench.latency, fly_jax.bench.kernels\n"
        "print({'fastapi', 'uvicorn', 'pydantic', 'starlette', 'serving'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_summary_says_how_each_phase_ended(tmp_path: Path) -> None:
    (line,) = summary(run_phases([Phase("fails", 1.0, (*PROGRAM, "raise SystemExit(3)"))], tmp_path, 60.0))
    assert line.startswith("fails            failed")
