"""The README's commands and code run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fly_jax.bench.__main__ import parse
from fly_jax.cli.main import main
from tests.tiny_models import CASES, write_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAST = ["--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--layouts", "4", "-O", "0", "--quiet"]


def console_commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [" ".join(line[2:].split("#")[0].split()) for line in text.splitlines() if line.startswith("$ ")]


def test_every_command_is_covered_by_a_test_or_by_ci() -> None:
    ci = "".join((ROOT / ".ci" / name).read_text(encoding="utf-8") for name in ("run", "smoke"))
    covered_here = ("source .venv", "fly-jax serve MODEL_DIR", "fly-jax generate", "fly-jax convert", "python -m ")
    for command in console_commands():
        if command.startswith("make "):
            assert command in ci
        elif command.startswith("curl "):
            path = re.search(r":8000(/\S+)", command)
            assert path is not None
            assert path[1] in ci
        else:
            assert command.startswith(covered_here), command


@pytest.mark.slow
def test_generate_and_convert_work_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "hf", CASES["llama_gqa_tied"])
    folders = {"MODEL_DIR": str(tmp_path / "hf"), "HF_DIR": str(tmp_path / "hf"), "OUT_DIR": str(tmp_path / "out")}
    ran = 0
    for command in console_commands():
        words = [folders.get(word, word) for word in shlex.split(command)]
        if words[:2] == ["fly-jax", "generate"]:
            assert main([*words[1:], *FAST]) == 0
            assert "The sky is" in capsys.readouterr().out
        elif words[:2] == ["fly-jax", "convert"]:
            assert main([*words[1:], "--quiet"]) == 0
            assert (tmp_path / "out" / "fly_jax.json").exists()
        else:
            continue
        ran += 1
    assert ran == 2


def test_the_serve_flags_exist() -> None:
    (serve,) = [command for command in console_commands() if command.startswith("fly-jax serve")]
    # A folder that is missing is found out only after all flags were understood.
    assert main([*shlex.split(serve)[1:-1], "0"]) == 2


def test_the_benchmarks_flags_exist() -> None:
    commands = [command for command in console_commands() if command.startswith("python -m fly_jax.bench")]
    assert len(commands) == 3
    for command in commands:
        assert callable(parse(shlex.split(command)[3:]).command)


@pytest.mark.slow
def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SwitchReport(number=1, source='1+1+1+1', target='4'" in done.stdout
