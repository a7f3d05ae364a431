"""Measures how fast a model is served, and what changing its layout costs. Every command has its own --help."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from fly_jax.bench import (
    abuse,
    gpu,
    kernels,
    latency,
    report,
    serve_options,
    sweep_options,
    switch,
    terminal,
    throughput,
)
from fly_jax.cli.main import Parser
from fly_jax.errors import FlyJaxError

# What one may want to know, and the commands that tell it, each in one line.
COMMANDS: dict[str, dict[str, tuple[ModuleType, str]]] = {
    "What do clients see of a server under load?": {
        "serve": (serve_options, "time to the first token, time between tokens, requests and tokens a second"),
        "sweep": (sweep_options, "the same load in every layout and with every policy, compared, with pictures"),
        "abuse": (abuse, "what well-behaved clients see while one misbehaves, a phase a way"),
    },
    "How fast is the engine by itself, without a server?": {
        "throughput": (throughput, "requests and tokens a second when all requests are there at once"),
        "latency": (latency, "how long one batch of requests takes from its prompts to its last token"),
    },
    "What does one part of it cost?": {
        "switch": (switch, "what each way of changing the layout costs requests in flight"),
        "kernels": (kernels, "how near attention comes to what the device can do"),
        "gpu": (gpu, "all of this and the engine on one GPU, in eight minutes"),
    },
    "How do I show results to others?": {
        "report": (report, "one HTML page with tables and pictures from result files"),
    },
}
EXAMPLES = """\
A layout says how devices form groups that share the model: 1+1+1+1 is four groups of one device, 4 one of four.
'serve' and 'sweep' send random requests, or a workload by its name: bench/workloads/README.md describes them.

To start with, on CPU and with the bundled model:
  python -m fly_jax.bench throughput --layout 1+1+1+1 4
  python -m fly_jax.bench serve --self-hosted checkpoints/demo/model --workload burst-demo --save-result
  python -m fly_jax.bench report bench/results/*.json"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark; returns the exit code, 2 for anything that the user can mend."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return int(options.command(options))
    except FlyJaxError as error:
        terminal.say(f"fly_jax.bench: error: {error}")
        return 2
    except KeyboardInterrupt:
        return terminal.INTERRUPTED_CODE


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, the command's function among them as ``command``."""
    parser = Parser(
        prog="python -m fly_jax.bench",
        usage="%(prog)s COMMAND [options]",
        description=_overview(),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Without a help of their own here, since argparse would list them once more, and without groups.
    commands = parser.add_subparsers(
        required=True, dest="name", metavar="COMMAND", help="one of these", prog=parser.prog
    )
    parsers = {}
    for group in COMMANDS.values():
        for name, (module, _) in group.items():
            parsers[name] = commands.add_parser(name)
            module.add_arguments(parsers[name])
    # By itself, argparse blames an unknown option on the main parser, whose help does not tell which there are.
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parsers[options.name].error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _overview() -> str:
    """The commands by what one wants to know."""
    width = max(len(name) for group in COMMANDS.values() for name in group)
    lines = [str(__doc__)]
    for question, group in COMMANDS.items():
        lines += ["", question, *(f"  {name:<{width}}  {text}" for name, (_, text) in group.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
