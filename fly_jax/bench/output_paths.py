"""Whether something can be written, asked before minutes are spent on what is to be in it."""

from __future__ import annotations

import os
from pathlib import Path

from fly_jax.errors import ConfigError


def check_file(option: str, path: Path) -> None:
    """
    Raises:
        ConfigError: the path is a folder, or no file can be written there.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: name a file in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path} is not yours to write: name another file")
    check_folder(option, path.parent)


def check_folder(option: str, folder: Path) -> None:
    """
    Raises:
        ConfigError: it is not there and cannot be made, or cannot be written to.
    """
    present = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not present.is_dir():
        raise ConfigError(f"{option}: {present} is a file, and {folder} cannot be a folder: name another place")
    if not os.access(present, os.W_OK):
        raise ConfigError(f"{option}: {present} is not yours to write to: name another place")
