"""Result files: figures with the date, the versions and the machine that they come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fly_jax


def provenance() -> dict[str, Any]:
    """When, with what and on what a figure was measured."""
    import jax

    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "fly_jax": fly_jax.__version__,
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def save(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes ``name.json`` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n")
    return path
