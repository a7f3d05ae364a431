"""Reads the fields of a workload file, each of its type and within its bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fly_jax.errors import ConfigError

# TOML's integers have 64 bits. Python reads longer ones, but neither floats nor arrays can hold them.
LARGEST_INTEGER = 2**63 - 1


class Fields:
    """A table of a TOML file. Whoever has read all fields that there may be calls ``finish``.

    Every reader raises ConfigError, naming the file, the key, what it must be and what it is. A reader with a
    ``default`` returns it where the key is absent; without one the key is required.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], where: str = "") -> None:
        self.file = file
        self._values = values
        self._where = where
        self._known: list[str] = []

    def has(self, key: str) -> bool:
        """Whether an optional key is there; from then on it is a known one."""
        self._know(key)
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        if default is not None and not self.has(key):
            return default
        value = self._take(key, "a string")
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def integer(self, key: str, *, minimum: int | None = None, default: int | None = None) -> int:
        if default is not None and not self.has(key):
            return default
        meant = "an integer" if minimum is None else f"an integer of at least {minimum}"
        value = self._take(key, meant)
        if not _is_integer(value) or (minimum is not None and value < minimum):
            raise self.wrong(key, meant)
        return int(value)

    def number(
        self,
        key: str,
        *,
        minimum: float | None = None,
        above: float | None = None,
        maximum: float = math.inf,
        default: float | None = None,
    ) -> float:
        """A finite number."""
        if default is not None and not self.has(key):
            return default
        meant = "a number"
        meant += "" if minimum is None else f" of at least {minimum:g}"
        meant += "" if above is None else f" above {above:g}"
        meant += "" if math.isinf(maximum) else f" and at most {maximum:g}"
        value = self._take(key, meant)
        if (
            not _is_number(value)
            or (minimum is not None and value < minimum)
            or (above is not None and value <= above)
            or value > maximum
        ):
            raise self.wrong(key, meant)
        return float(value)

    def integers_range(self, key: str, *, minimum: int) -> tuple[int, int]:
        """``[smallest, largest]``, both meant."""
        meant = f"[smallest, largest], two integers of at least {minimum}"
        value = self._take(key, meant)
        if not _is_pair(value) or not all(_is_integer(each) for each in value) or not minimum <= value[0] <= value[1]:
            raise self.wrong(key, meant)
        return int(value[0]), int(value[1])

    def numbers_range(self, key: str, *, minimum: float, maximum: float = math.inf) -> tuple[float, float]:
        """``[smallest, largest]``."""
        meant = f"[smallest, largest], two numbers of at least {minimum:g}"
        meant += "" if math.isinf(maximum) else f" and at most {maximum:g}"
        value = self._take(key, meant)
        if (
            not _is_pair(value)
            or not all(_is_number(each) for each in value)
            or not minimum <= value[0] <= value[1] <= maximum
        ):
            raise self.wrong(key, meant)
        return float(value[0]), float(value[1])

    def tables(self, key: str) -> list[Fields]:
        """One or more ``[[key]]``."""
        meant = f"one or more tables [[{key}]]"
        value = self._take(key, meant)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise self.wrong(key, meant)
        return [Fields(self.file, each, f" in [[{key}]] number {number}") for number, each in enumerate(value, 1)]

    def wrong(self, key: str, meant: str) -> ConfigError:
        """The error of a field that is not what is meant."""
        return ConfigError(f"{self.file}: {key}{self._where} must be {meant}, got {_shown(self._values.get(key))}")

    def error(self, message: str) -> ConfigError:
        """An error about this table."""
        return ConfigError(f"{self.file}: {message}{self._where}")

    def finish(self) -> None:
        """Raises ConfigError for a key that nobody has asked for."""
        for key, value in self._values.items():
            if key not in self._known:
                raise ConfigError(
                    f"{self.file}: unknown key {key}{self._where} (= {_shown(value)}); known ones are "
                    f"{', '.join(sorted(self._known))}"
                )

    def _take(self, key: str, meant: str) -> Any:
        if not self.has(key):
            raise ConfigError(f"{self.file}: {key}{self._where} is missing; it must be {meant}")
        return self._values[key]

    def _know(self, key: str) -> None:
        if key not in self._known:
            self._known.append(key)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER


def _is_number(value: object) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _shown(value: object) -> str:
    """As Python writes it, but integers that are too large, of hundreds of digits perhaps, only in words."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return "an integer of more than 64 bits"
    return repr(value)
