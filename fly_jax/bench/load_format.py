"""``--load-format``, the same for every command that loads a model."""

from __future__ import annotations

import argparse

from fly_jax.cli.options import LOAD_FORMAT_HELP
from fly_jax.config import LOAD_FORMATS


def add_load_format(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--load-format", choices=LOAD_FORMATS, default="auto", help=LOAD_FORMAT_HELP)
