"""``abuse``: what the others see of a server while one client misbehaves in every way that is known."""

from __future__ import annotations

import argparse
from pathlib import Path

from fly_jax.bench import results
from fly_jax.bench.abuse_parts import sizes
from fly_jax.bench.serve_options import command_module

DESCRIPTION = (
    "Abuses a server, a phase a way: texts of megabytes, huge chats and lists of token ids, slow and idle connections, "
    "more connections than it can have files, requests that change its layout, floods. Meanwhile well-behaved clients "
    "in a process of their own measure the longest gap of a stream, the answers of /health and those to a short "
    "prompt. Prints them beside those of a phase without abuse, with what the abuser was answered, the switches that "
    "were made, and the memory and the log of a server that is started here or whose --pid and --server-log are given."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.set_defaults(command=_run)
    group = parser.add_argument_group("server")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--url", "--base-url", help="a running server, such as http://127.0.0.1:8000: one that you may abuse"
    )
    where.add_argument("--self-hosted", type=Path, metavar="MODEL_DIR", help="start 'fly-jax serve MODEL_DIR' instead")
    group.add_argument(
        "--server-args", default="", metavar="ARGS", help="its further arguments, as one: --server-args='--devices 4'"
    )
    group.add_argument("--pid", type=int, help="process of a running server on this machine, to read its memory")
    group.add_argument("--server-log", type=Path, metavar="FILE", help="where the server's log goes")
    group.add_argument("--api-key", help="key that the server asks for (default: $FLY_JAX_API_KEY)")
    group.add_argument("--model", help="name in the requests (default: the first that the server lists)")
    group.add_argument(
        "--prompt", default="Once upon a time", help="of the well-behaved streams (default: %(default)s)"
    )
    group = parser.add_argument_group("phases")
    group.add_argument("--phases", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    sizes.add_arguments(group)
    group = parser.add_argument_group("results")
    results.add_arguments(group)
    group.add_argument(
        "--label", default="run", help="part of the result's name, such as before (default: %(default)s)"
    )


def _run(options: argparse.Namespace) -> int:
    return int(command_module("abuse_parts.run").run(options))
