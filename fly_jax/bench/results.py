"""Result files: figures with the date, the versions and the machine that they come from."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fly_jax
from fly_jax.errors import ConfigError

# A line each would make files of tens of thousands of lines. Only at the end of a line does a bracket open a list and
# not stand in a text, which JSON keeps on one.
_LIST_OF_NUMBERS = re.compile(r"\[\n[-+0-9.eE,\s]+\]")


def provenance(*, of_devices: bool = True) -> dict[str, Any]:
    """When, with what and on what a figure was measured.

    Args:
        of_devices: with this process's devices, which starts them; a client of another process's server must not take
            memory of devices that may be that server's, and would show its own.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "fly_jax": fly_jax.__version__,
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
        **(_devices() if of_devices else {}),
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _devices() -> dict[str, Any]:
    import jax

    devices = jax.devices()
    return {"device_kind": devices[0].device_kind, "num_devices": len(devices)}


def save(folder: Path, name: str, result: dict[str, Any], *, of_devices: bool = True) -> Path:
    """:func:`write` to ``name.json`` in a folder, whose path is returned."""
    path = folder / f"{name}.json"
    write(path, result, of_devices=of_devices)
    return path


def write(path: Path, result: dict[str, Any], *, of_devices: bool = True) -> None:
    """Writes a result with its provenance; what the result says itself goes before that.

    Raises:
        ConfigError: it cannot be written there.
    """
    text = json.dumps({**provenance(of_devices=of_devices), **result}, indent=1)
    text = _LIST_OF_NUMBERS.sub(lambda found: " ".join(found[0].split()), text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    except OSError as error:
        raise ConfigError(f"the result cannot be written to {path}: {error.strerror}") from error


def add_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Whether a command saves its figures, and where."""
    parser.add_argument("--save-result", action="store_true", help="write the figures as JSON")
    parser.add_argument(
        "--result-dir", type=Path, default=Path("bench/results"), help="where to (default: %(default)s)"
    )
