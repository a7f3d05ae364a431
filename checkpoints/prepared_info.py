"""``fly_jax.json``: what a prepared folder says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_jax.errors import CheckpointError
from fly_jax.host.json_files import read_json

INFO_FILE = "fly_jax.json"
FORMAT_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PreparedInfo:
    """What ``fly_jax.json`` says.

    Attributes:
        max_tp: the widest degree that the buffers can be viewed at; make the model's spec with it.
        dtype: one of ``DTYPES``; config.json keeps naming the original checkpoint's.
        shapes: of every buffer, by name.
        files: bytes of every file of the Orbax checkpoint, by its path in the folder.
    """

    max_tp: int
    dtype: str
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, int]


def prepared_info(folder: Path) -> PreparedInfo | None:
    """What a prepared folder says of itself; None where the folder is not one.

    Raises:
        CheckpointError: ``fly_jax.json`` is damaged or of another format version.
    """
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        return None
    raw = read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {raw.get('format_version')}, this release reads {FORMAT_VERSION}: "
            "run fly-jax convert again"
        )
    try:
        return _parse_info(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): run fly-jax convert again") from error


def write_info(folder: Path, info: PreparedInfo) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "max_tp": info.max_tp,
        "dtype": info.dtype,
        "buffers": info.shapes,
        "files": info.files,
    }
    (folder / INFO_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parse_info(raw: dict[str, Any]) -> PreparedInfo:
    shapes = {str(name): tuple(int(size) for size in shape) for name, shape in raw["buffers"].items()}
    files = {str(file): int(size) for file, size in raw["files"].items()}
    info = PreparedInfo(int(raw["max_tp"]), str(raw["dtype"]), shapes, files)
    if info.max_tp < 1 or info.dtype not in DTYPES:
        raise ValueError(f"max_tp {info.max_tp}, dtype {info.dtype}")
    return info
