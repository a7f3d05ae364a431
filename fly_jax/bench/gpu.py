"""``gpu``: what one GPU can tell in eight minutes, the most telling first."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fly_jax.bench import results, terminal
from fly_jax.bench.output_paths import check_folder
from fly_jax.errors import ConfigError

MODELS = Path("bench/models")
SUMMARY_LINES = 20
# Of a phase's output, in the report; all of it is in the log.
LAST_LINES = 6


@dataclass(frozen=True)
class Phase:
    """One command of ours, in a process of its own.

    Attributes:
        weight: of the time; a phase gets its share of what those before it have left.
        arguments: of ``python -m``.
        result: the file that it writes into the output folder, if any.
    """

    name: str
    weight: float
    arguments: tuple[str, ...]
    result: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a phase.

    Attributes:
        state: ``done``, ``failed`` or ``out of time``.
        said: its last lines on standard output.
        found: what it wrote.
    """

    name: str
    state: str
    seconds: float
    said: list[str]
    found: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs what one GPU can tell, the most telling first: the engine with the bundled model, the kernels against "
        "attention by its definition, an 8B-shaped model of random weights at several batch sizes, attention as shares "
        "of what the device can do, and settings for the kernels' tuning table. Each is a process of its own with its "
        "share of the time, so that one that hangs takes no other with it; the report is written after each. --toy "
        "runs the same with toy sizes, on CPU too."
    )
    parser.set_defaults(command=run)
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), metavar="DIR",
        help="folder for the report and the log (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything together (default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="toy sizes: whether everything runs, on CPU")


def run(options: argparse.Namespace) -> int:
    """Runs the phases.

    Returns:
        0 if each ended well, else 1.

    Raises:
        ConfigError: the folder cannot be written to, or there is no time.
    """
    if options.seconds <= 0:
        raise ConfigError(f"--seconds must be above 0, got {options.seconds:g}")
    check_folder("--out", options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_phases(phases(options.out, toy=options.toy), options.out, options.seconds)
    lines = summary(outcomes)
    (options.out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all(each.state == "done" for each in outcomes) else 1


def phases(out: Path, *, toy: bool) -> list[Phase]:
    """In order of value; see :func:`add_arguments`."""
    model = str(MODELS / ("toy" if toy else "llama-8b"))
    sizes = (1, 2) if toy else (1, 8, 64, 256)
    lengths = ("--input-len", "16", "--output-len", "4" if toy else "64", "--num-iters", "2", "--num-iters-warmup", "1")
    grid = ("--contexts", "64", "--batches", "1") if toy else ("--contexts", "32768", "8192", "512", "131072")
    bench = ("fly_jax.bench",)
    found = [
        Phase("engine", 2.0, (*bench, "latency", *_one_device(out, "engine"), "--batch-size", "8", *lengths), "engine"),
        Phase("oracle", 2.0, ("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels_pallas")),
    ]
    for size in sizes:
        name = f"model-batch-{size}"
        dummy = ("--model", model, "--load-format", "dummy", "--batch-size", str(size))
        found.append(Phase(name, 2.0, (*bench, "latency", *_one_device(out, name), *dummy, *lengths), name))
    prompt = ("--input-len", "64" if toy else "8192", "--output-len", "1", "--batch-size", "1", "--num-iters", "2")
    dummy = ("--model", model, "--load-format", "dummy", "--num-iters-warmup", "1")
    found.append(Phase("prompt", 1.0, (*bench, "latency", *_one_device(out, "prompt"), *dummy, *prompt), "prompt"))
    save = ("--save-result", "--result-dir", str(out))
    found.append(Phase("attention", 3.0, (*bench, "kernels", *grid, "--degrees", "1", *save), "kernels"))
    if not toy:  # there is nothing to tune on a CPU
        found.append(Phase("tune", 1.5, (*bench, "kernels", "--tune", "--degrees", "1", "8")))
    return found


def _one_device(out: Path, name: str) -> tuple[str, ...]:
    return ("--devices", "1", "--layout", "1", "--output-json", str(out / f"{name}.json"))


def run_phases(todo: list[Phase], out: Path, seconds: float) -> list[Outcome]:
    """Runs them one after another and writes ``gpu.json`` after each."""
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for index, phase in enumerate(todo):
        left = deadline - time.monotonic()
        share = left * phase.weight / sum(each.weight for each in todo[index:])
        terminal.say(f"{phase.name}: at most {share:.0f} s")
        outcomes.append(_run_phase(phase, out, share))
        report = {"phases": [asdict(each) for each in outcomes]}
        results.save(out, "gpu", report, of_devices=False)  # this process must not take the phases' GPU
    return outcomes


def _run_phase(phase: Phase, out: Path, seconds: float) -> Outcome:
    said, started = out / f"{phase.name}.txt", time.monotonic()
    with said.open("w") as output, (out / "log.txt").open("a") as log:
        # A session of its own, so that what it has started ends with it.
        command = [sys.executable, "-m", *phase.arguments]
        with subprocess.Popen(command, stdout=output, stderr=log, start_new_session=True) as process:
            try:
                state = "done" if process.wait(max(seconds, 0.0)) == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = "out of time"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    lines = said.read_text(errors="replace").splitlines()
    said.unlink()
    with (out / "log.txt").open("a") as log:
        log.writelines(f"{phase.name}: {line}\n" for line in lines)
    found = _taken(out / f"{phase.result}.json") if phase.result else None
    return Outcome(phase.name, state, round(time.monotonic() - started, 1), lines[-LAST_LINES:], found)


def _taken(path: Path) -> Any:
    """A phase's own file, which becomes a part of the report; None if it did not come to that."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    path.unlink()
    return found


def summary(outcomes: list[Outcome]) -> list[str]:
    """A line a phase."""
    lines = [f"{each.name:<16} {each.state:<12} {each.seconds:>6.1f} s  {_figures(each)}".rstrip() for each in outcomes]
    return lines[:SUMMARY_LINES]


def _figures(outcome: Outcome) -> str:
    found = outcome.found or {}
    if "avg_latency" in found:
        a_token = 1e3 * found["avg_latency"] / found["output_len"]
        what = f"{found['batch_size']} requests of {found['input_len']} + {found['output_len']} tokens"
        return f"{what}: {1e3 * found['avg_latency']:,.1f} ms, {a_token:,.2f} ms a token on {found['device_kind']}"
    if found.get("rows"):
        best = max(found["rows"], key=lambda row: row["share"])
        worst = min(found["rows"], key=lambda row: row["share"])
        return f"{len(found['rows'])} measured, {worst['share']:.0%} to {best['share']:.0%} of what the device can do"
    return outcome.said[-1][:100] if outcome.said else ""
