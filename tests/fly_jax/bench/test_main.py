"""The command line as a whole: its help, and where its errors point."""

from __future__ import annotations

import pytest

from fly_jax.bench.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", [name for group in COMMANDS.values() for name in group])
def test_a_mistake_in_a_command_points_to_that_command_s_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [command, *(["x.json"] if command == "report" else []), "--no-such-option"]
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    prog = f"python -m fly_jax.bench {command}"
    assert capsys.readouterr().err == (f"{prog}: error: unrecognized arguments: --no-such-option (see {prog} --help)\n")


@pytest.mark.parametrize("given", [["serv"], [], ["--no-such-option"]])
def test_a_mistake_before_any_command_points_to_the_main_help(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("(see python -m fly_jax.bench --help)\n")
    assert error.count("\n") == 1


def test_the_main_help_has_a_line_for_every_command_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (name for group in COMMANDS.values() for name in group):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    examples = [line for line in lines if line.startswith("  python -m fly_jax.bench ")]
    assert len(examples) == 3
    assert any("bench/workloads" in line for line in lines)
