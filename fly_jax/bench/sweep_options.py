"""Options of ``python -m fly_jax.bench sweep``: those of ``serve``, and what is compared."""

from __future__ import annotations

import argparse

from fly_jax.bench.serve_options import add_load_arguments, command_module
from fly_jax.cli.options import STRATEGIES

DESCRIPTION = (
    "Sends one workload again and again: in every static layout, and with the policy that follows the load, under each "
    "strategy of switching. Prints a table; --save-result also writes JSON and pictures. Try: python -m fly_jax.bench "
    "sweep --self-hosted checkpoints/demo/model --workload burst-demo --goodput ttft:500 --save-result"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.set_defaults(command=_run)
    compared = parser.add_argument_group("what is compared")
    compared.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="static ones, and the first is where auto starts (default: all)"
    )
    compared.add_argument(
        "--policies", nargs="+", choices=("static", "auto"), default=["static", "auto"], help="(default: both)"
    )
    compared.add_argument(
        "--strategies",
        nargs="+",
        choices=STRATEGIES,
        help="of auto's switches, on a server each (default: all)",
    )
    compared.add_argument(
        "--rate-scales",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="X",
        help="times its rate (default: 1)",
    )
    compared.add_argument(
        "--admin-key", help="that the server asks for to change its layout (default: $FLY_JAX_ADMIN_KEY)"
    )
    add_load_arguments(parser)


def _run(options: argparse.Namespace) -> int:
    return int(command_module("sweep").run(options))
