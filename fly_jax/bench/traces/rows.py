"""What traces have in common: rows, and how values are read from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fly_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace.

    Attributes:
        line: of the file, counted from 1.
        at: when it came, in seconds by the trace's own clock.
        hash_ids: of the prompt's blocks, where the trace has them.
    """

    line: int
    at: float
    input_tokens: int
    output_tokens: int
    tag: str = ""
    hash_ids: tuple[int, ...] = ()


def open_trace(path: Path) -> TextIO:
    """Opens a text file, with or without a byte order mark. Bytes that are no UTF-8 become replacement characters.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.open(encoding="utf-8-sig", errors="replace", newline="")
    except OSError as error:
        raise ConfigError(f"cannot read the dataset {path}: {error.strerror}") from error


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The line and the values of each row that is not empty; other columns may be there too, in any order.

    Raises:
        ConfigError: a column is missing, or the file is not CSV.
    """
    with open_trace(path) as file:
        reader = csv.DictReader(file, restval="")
        try:
            yield from _checked_rows(path, reader, columns)
        except csv.Error as error:
            raise ConfigError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _checked_rows(
    path: Path, reader: csv.DictReader[str], columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    found = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = found
    missing = [name for name in columns if name not in found]
    if missing:
        raise ConfigError(
            f"{path} has no column {', '.join(missing)}; it must have {', '.join(columns)}, "
            f"and has {', '.join(found) or 'none'}"
        )
    for row in reader:
        yield reader.line_num, row


def token_count(path: Path, line: int, name: str, value: object) -> int:
    """A number of tokens, from a number or its text.

    Raises:
        ConfigError: it is none.
    """
    number = seconds(path, line, name, value)
    if number < 0 or not number.is_integer():
        raise ConfigError(f"{path}, line {line}: {name} must be a number of tokens, got {value!r}")
    return int(number)


def seconds(path: Path, line: int, name: str, value: object) -> float:
    """A finite number, from a number or its text.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{path}, line {line}: {name} must be a number, got {value!r}")
    return number
