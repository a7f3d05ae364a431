"""Figures of one part, on disk as soon as they are known."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


class Records:
    """Appends one JSON object a line, so that a process that is killed leaves what it had found."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, line: str, **figures: Any) -> None:
        """
        Args:
            line: what the figures say, for the summary; printed too.
        """
        with self._path.open("a") as file:
            file.write(json.dumps({"line": line, **figures}) + "\n")
        print(line, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """What is there; a last line that was cut short is left out."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def part_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options that every part has."""
    parser = argparse.ArgumentParser(prog=f"python -m fly_jax.bench.gpu_parts.{prog}", description=description)
    parser.add_argument("--records", type=Path, required=True, metavar="FILE", help="where figures are appended")
    return parser
