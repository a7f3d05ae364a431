"""Finds and reads the TOML files that declare workloads."""

from __future__ import annotations

import tomllib
from pathlib import Path

import fly_jax
from fly_jax.bench.workload_fields import Fields
from fly_jax.errors import ConfigError

# What a workload can be of: its key ``kind``. One that is not random has a dataset.
RANDOM, SHAREGPT, AZURE, BURSTGPT, MOONCAKE = KINDS = ("random", "sharegpt", "azure", "burstgpt", "mooncake")


def workloads_folder() -> Path:
    """``bench/workloads`` of the source checkout that this package lies in; other installations have none."""
    return Path(fly_jax.__file__).resolve().parents[1] / "bench" / "workloads"


def known_workloads() -> list[str]:
    """The names of the workloads that come with the source."""
    return sorted(path.stem for path in workloads_folder().glob("*.toml"))


def find_workload(name_or_path: str) -> Path:
    """The file of a known workload, or of a path: whatever ends in ``.toml`` or has a folder in it is one.

    Raises:
        ConfigError: there is no such file; the message lists the known names.
    """
    given = Path(name_or_path)
    is_path = given.suffix == ".toml" or len(given.parts) != 1
    path = given if is_path else workloads_folder() / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(known_workloads()) or f"none, as there is no folder {workloads_folder()}"
        raise ConfigError(f"no workload {name_or_path!r}: give the path of a TOML file or a known name ({known})")
    return path


def read_workload(path: Path) -> Fields:
    """The fields of a workload's file.

    Raises:
        ConfigError: it cannot be read or is not TOML.
    """
    try:
        return Fields(path, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the workload {path}: {error.strerror}") from error
    except ValueError as error:  # also of text that is no UTF-8, and of numbers that are too long to read
        raise ConfigError(f"{path} is not TOML: {error}") from error
