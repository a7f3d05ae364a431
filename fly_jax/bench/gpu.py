"""``gpu``: what one GPU can tell in eight minutes, the most telling first."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fly_jax.bench import results, terminal
from fly_jax.bench.gpu_parts.records import read
from fly_jax.bench.output_paths import check_folder
from fly_jax.errors import ConfigError

MODELS = Path("bench/models")
SUMMARY_LINES, LINE_WIDTH = 20, 160
_TEST = re.compile(r"\S+::(?P<name>.+) (?P<state>PASSED|FAILED|ERROR|SKIPPED)\b")
_NAMES_ERROR = re.compile(r"^[\w.]*(Error|Exception)\b|: error: |^[^ ]+: No module named")


@dataclass(frozen=True)
class Phase:
    """One command of ours, in a process of its own.

    Attributes:
        weight: of the time; a phase gets its share of what those before it have left.
        arguments: of ``python -m``.
        lines: most of the summary.
        result: the file that it writes into the output folder, if any: JSON, or a JSON object a line.
        instead_of: it is run only if that phase did not end well.
    """

    name: str
    weight: float
    arguments: tuple[str, ...]
    lines: int = 1
    result: str | None = None
    instead_of: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a phase.

    Attributes:
        state: ``done``, ``failed`` or ``out of time``.
        said: of its standard output, what the summary has room for.
        found: what it wrote.
    """

    name: str
    state: str
    seconds: float
    said: list[str]
    found: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs what one GPU can tell, the most telling first: the engine with the bundled model, its tokens beside "
        "those of the host, the kernels against attention by its definition, an 8B-shaped model of random weights at "
        "several batch sizes with a long prompt and a trace, attention as shares of what the device can do, and "
        "settings for the kernels' tuning table. Each is a process of its own with its share of the time, so that one "
        "that hangs takes no other with it, and plain JAX stands in where the kernels fail; the report is written "
        "after each. --toy runs the same with toy sizes, on CPU too."
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
        ConfigError: the folder cannot be written to, there is no time, or there is no GPU and toy sizes are not meant.
    """
    if options.seconds <= 0:
        raise ConfigError(f"--seconds must be above 0, got {options.seconds:g}")
    check_folder("--out", options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    todo = phases(options.out, toy=options.toy)
    outcomes = run_phases(todo, options.out, options.seconds, needs_gpu=not options.toy)
    lines = summary(outcomes)
    (options.out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0 if all(each.state == "done" for each in outcomes) else 1


def phases(out: Path, *, toy: bool) -> list[Phase]:
    """In order of value; see :func:`add_arguments`."""
    engine = _part(out, "engine")
    model = _part(out, "model", "--model", str(MODELS / ("toy" if toy else "llama-8b")), *_sizes(toy))
    plain = ("--attention-backend", "xla")
    against = ("--against", str(out / "engine.jsonl"))
    heads = ("--group", "1", "--head-dim", "16") if toy else ()
    kernels = ("fly_jax.bench", "kernels", "--degrees", "1", "8", *heads)
    # Long decodes tell most, then what serves crowds; on a CPU, kernels are interpreted.
    grid = (
        ("64", "--batches", "1") if toy else ("32768", "8192", "512", "131072", "2048", "--batches", "1", "64", "256")
    )
    tuned = ("--backend", "pallas", "--contexts", "32", "--candidates", "2") if toy else ("--candidates", "24")
    save = ("--beside", "torch", "--save-result", "--result-dir", str(out))
    return [
        Phase("engine", 2.5, engine, lines=4, result="engine.jsonl"),
        Phase("engine-xla", 2.5, (*engine, *plain), lines=4, result="engine.jsonl", instead_of="engine"),
        Phase("host", 1.0, _part(out, "engine", *against, records="host"), result="host.jsonl"),
        # In two processes, as one may crash.
        Phase("oracle-decode", 1.0, _oracle("decode", toy)),
        Phase("oracle-prefill", 1.0, _oracle("not decode", toy)),
        Phase("model", 4.0, model, lines=7, result="model.jsonl"),
        Phase("model-xla", 3.0, (*model, *plain), lines=7, result="model.jsonl", instead_of="model"),
        Phase("attention", 2.0, (*kernels, "--contexts", *grid, *save), result="kernels.json"),
        Phase("tune", 1.5, (*kernels, "--tune", *tuned)),
    ]


def _part(out: Path, name: str, *arguments: str, records: str | None = None) -> tuple[str, ...]:
    return (f"fly_jax.bench.gpu_parts.{name}", "--records", str(out / f"{records or name}.jsonl"), *arguments)


def _sizes(toy: bool) -> tuple[str, ...]:
    if toy:
        return ("--batches", "1", "2", "--prompt", "64", "--copy-bytes", "100000000")
    return ("--batches", "1", "8", "64", "256", "--prompt", "8192")


def _oracle(which: str, toy: bool) -> tuple[str, ...]:
    """Attention by its definition beside the kernels, the tests that an expression of pytest's chooses."""
    # A line a test as it ends, the configured -q notwithstanding: time may run out.
    pytest = ("pytest", "-vv", "--tb=short", "-p", "no:cacheprovider")
    if toy:
        return (*pytest, "tests/kernels_pallas/test_attention.py", "-k", f"the_kernels and {which} and tp1")
    return (*pytest, "tests/kernels_pallas/test_on_gpu.py", "-m", "gpu", "-k", which)


def run_phases(todo: list[Phase], out: Path, seconds: float, *, needs_gpu: bool = False) -> list[Outcome]:
    """Runs them one after another and writes ``gpu.json`` after each.

    Raises:
        ConfigError: a GPU is needed and the first phase found none.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for index, phase in enumerate(todo):
        to_come = [each for each in todo[index:] if _is_wanted(each, outcomes)]
        if phase not in to_come:
            continue
        left = deadline - time.monotonic()
        share = left * phase.weight / sum(each.weight for each in to_come)
        terminal.say(f"{phase.name}: at most {share:.0f} s")
        outcomes.append(_run_phase(phase, out, share))
        report = {"phases": [asdict(each) for each in outcomes]}
        results.save(out, "gpu", report, of_devices=False)  # this process must not take the phases' GPU
        if needs_gpu and index == 0 and _platform(outcomes[0]) not in ("gpu", None):
            raise ConfigError(f"jax finds no GPU here but {_platform(outcomes[0])}: --toy runs toy sizes on it")
    for name in {each.result for each in todo if each.result}:  # all of it is in the report
        (out / name).unlink(missing_ok=True)
    return outcomes


def _is_wanted(phase: Phase, outcomes: list[Outcome]) -> bool:
    return phase.instead_of is None or any(each.name == phase.instead_of and each.state != "done" for each in outcomes)


def _platform(outcome: Outcome) -> str | None:
    return outcome.found[0]["platform"] if outcome.found else None


def _run_phase(phase: Phase, out: Path, seconds: float) -> Outcome:
    said, started = out / f"{phase.name}.txt", time.monotonic()
    if phase.result:
        (out / phase.result).unlink(missing_ok=True)  # of an earlier run
    with said.open("w") as output, (out / "log.txt").open("a+", errors="replace") as log:
        begin = log.tell()
        # A session of its own, so that what it has started ends with it.
        command = [sys.executable, "-u", "-m", *phase.arguments]
        with subprocess.Popen(command, stdout=output, stderr=log, start_new_session=True) as process:
            try:
                state = "done" if process.wait(max(seconds, 0.0)) == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = "out of time"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        log.seek(begin)
        errors = log.read().splitlines()
        lines = said.read_text(errors="replace").splitlines()
        log.writelines(f"{phase.name}: {line}\n" for line in lines)
    said.unlink()
    found = _read(out / phase.result) if phase.result else None
    told = _told(lines, found, phase.lines) + (_why(errors) if state == "failed" else [])
    return Outcome(phase.name, state, round(time.monotonic() - started, 1), told, found)


def _why(errors: list[str]) -> list[str]:
    """The line of standard error that names the error, else its last."""
    lines = [line.strip()[:LINE_WIDTH] for line in errors if line.strip()]
    return ([line for line in lines if _NAMES_ERROR.search(line)] or lines)[-1:]


def _told(lines: list[str], found: Any, most: int) -> list[str]:
    """What the summary says of a phase: of rows, the best and the worst; of tests, how many passed and the first that
    did not; else the last lines that it printed."""
    if isinstance(found, dict) and found.get("rows"):
        best, worst = (pick(found["rows"], key=lambda row: row["share"]) for pick in (max, min))
        named = "{kind} at TP {tp}, batch {batch}, context {context}".format(**worst)
        told = f"{len(found['rows'])} measured, {worst['share']:.0%} ({named}) to {best['share']:.0%} of the device"
        return [told]
    if tests := [test for line in lines if (test := _TEST.match(line))]:
        failed = [each["name"] for each in tests if each["state"] != "PASSED"]
        return [f"{len(tests) - len(failed)} passed, {len(failed)} not{''.join(f'; {name}' for name in failed[:2])}"]
    return [line.strip()[:LINE_WIDTH] for line in lines if line.strip()][-most:]


def _read(path: Path) -> Any:
    """A phase's own figures, which become a part of the report; None if it did not come to that."""
    try:
        return read(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def summary(outcomes: list[Outcome]) -> list[str]:
    """How each phase ended, and what it found."""
    lines = []
    for each in outcomes:
        head = f"{each.name:<14} {each.state:<11} {each.seconds:>4.0f} s  "
        first, *others = each.said or [""]
        lines += [(head + first).rstrip(), *(" " * len(head) + line for line in others)]
    return lines[:SUMMARY_LINES]
