"""The benchmark command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from fly_jax.bench import kernels, latency, report, serve_options, sweep_options, switch, throughput
from fly_jax.cli import Parser
from fly_jax.errors import FlyJaxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit code, 2 for anything that the user can mend."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(options.command(options))
    except FlyJaxError as error:
        print(f"fly_jax.bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, the command's function among them as ``command``."""
    parser = Parser(prog="python -m fly_jax.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, text in (
        ("serve", serve_options, "what clients of a server under load see"),
        ("sweep", sweep_options, "one workload under every layout and policy, with pictures"),
        ("throughput", throughput, "tokens a second of many requests at once, without a server"),
        ("latency", latency, "how long one batch takes, without a server"),
        ("switch", switch, "what each way of changing the layout costs streams in flight"),
        ("kernels", kernels, "how near attention comes to what the device can do"),
        ("report", report, "one HTML page with pictures from result files"),
    ):
        module.add_arguments(commands.add_parser(name, help=text))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
