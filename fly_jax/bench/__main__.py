"""The benchmark command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fly_jax.bench import kernels, switch
from fly_jax.bench.serve_options import add_serve_options
from fly_jax.cli import STRATEGIES, Parser
from fly_jax.config import ATTENTION_BACKENDS
from fly_jax.errors import ConfigError, FlyJaxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit code, 2 for anything that the user can mend."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(options.command(options))
    except FlyJaxError as error:
        print(f"fly_jax.bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _switch(options: argparse.Namespace) -> int:
    if options.devices & (options.devices - 1):
        raise ConfigError(f"--devices must be a power of two, got {options.devices}")
    return switch.run(options)


def _serve(options: argparse.Namespace) -> int:
    try:
        from fly_jax.bench import serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: python -m pip install 'fly-jax[bench]'") from error
    return serve.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m fly_jax.bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="what clients of a server under load see"))
    _add_switch(commands.add_parser("switch", help="what each way of changing the layout costs streams in flight"))
    _add_kernels(commands.add_parser("kernels", help="how near attention comes to what the device can do"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_serve)
    _add_result_options(add_serve_options(parser))


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Times attention over paged KV on one device, as a share of what the device copies (decodes) or multiplies "
        "(prompts) in the same run, beside jax.nn.dot_product_attention and PyTorch's SDPA on contiguous KV. Without "
        "a GPU it says so and times the path of plain JAX."
    )
    parser.set_defaults(command=kernels.run)
    for name, default, text in (
        ("contexts", None, "tokens of a request (default: 512 to 131072; on CPU 512 and 2048)"),
        ("batches", None, "requests of a decode (default: 1 to 256; on CPU 1 and 8)"),
        ("degrees", [1, 2, 4, 8], "TP degrees: a device takes its share of the heads (default: 1 2 4 8)"),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="N", default=default, help=text)
    parser.add_argument("--kv-heads", type=int, default=8, help="of the model (default: %(default)s)")
    parser.add_argument("--group", type=int, default=4, help="query heads a KV head (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block at TP 1 (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=ATTENTION_BACKENDS, default="auto", help="pallas is interpreted on CPU (default: auto)"
    )
    parser.add_argument("--tune", action="store_true", help="time candidates for the kernels' tuning table instead")
    _add_result_options(parser)


def _add_result_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--save-result", action="store_true", help="write the figures as JSON")
    parser.add_argument(
        "--result-dir", type=Path, default=Path("bench/results"), help="where to (default: %(default)s)"
    )


def _add_switch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Keeps streams in flight, changes the layout under them with each strategy, and prints what that cost: "
        "between every two uniform layouts and two mixed ones, or between those given by --switch."
    )
    parser.set_defaults(command=_switch)
    parser.add_argument("model", nargs="?", type=Path, help="model folder (default: the bundled demo model)")
    parser.add_argument(
        "--devices", type=int, default=8, help="devices; on CPU that many virtual ones (default: %(default)s)"
    )
    parser.add_argument(
        "--streams", type=int, default=16, help="requests in flight at each switch (default: %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="times that each switch is made (default: %(default)s)")
    parser.add_argument(
        "--switch", action="append", metavar="FROM,TO", help="only this switch, such as dp8,4+2+2; may be repeated"
    )
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' lengths (default: %(default)s)")
    _add_result_options(parser)


if __name__ == "__main__":
    sys.exit(main())
