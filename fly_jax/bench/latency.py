"""``latency``: how long one batch takes from its prompts to its last token, in each layout."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fly_jax.bench import offline, terminal

PERCENTILES = (10, 25, 50, 75, 90, 99)
# Options that a result file has.
SETTINGS = ("batch_size", "input_len", "output_len", "num_iters_warmup", "num_iters", "seed")


@dataclass(frozen=True, slots=True)
class Latency:
    """One layout's figures, in seconds, under vLLM's names where it has them.

    Attributes:
        switch_ms: what coming from the layout before took; None in the first.
        latencies: of each iteration that counts.
        percentiles: of those, linearly interpolated; by ``"10"``, ``"25"``, ``"50"``, ``"75"``, ``"90"``, ``"99"``.
    """

    layout: str
    switch_ms: float | None
    avg_latency: float
    latencies: list[float]
    percentiles: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Runs one batch of requests after another, in this process and without a server, and prints how long a batch "
        "takes from its prompts to its last token in each layout. Prompts are random token ids, and every answer has "
        "its whole length. Try: python -m fly_jax.bench latency --layout 1+1+1+1 4 --batch-size 1"
    )
    parser.set_defaults(command=run)
    offline.add_engine_arguments(parser, input_len=32, output_len=128)
    parser.add_argument("--batch-size", type=int, default=8, help="requests of a batch (default: %(default)s)")
    parser.add_argument(
        "--num-iters-warmup",
        type=int,
        default=3,
        help="batches that are run first in each layout and not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--num-iters", type=int, default=10, help="batches that count, in each layout (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes, what there is of it also when Ctrl-C ends it.

    Returns:
        0; 130 if it was interrupted.

    Raises:
        ConfigError, LayoutError: an option is wrong; one line that says what to do.
    """
    offline.check(options, at_least_one=("batch_size", "num_iters"), at_least_zero=("num_iters_warmup",))
    rows: list[Latency] = []
    # A single group has to hold the whole batch, or its last requests would wait for the first.
    interrupted = offline.was_interrupted(options, options.batch_size, partial(measure, options=options, rows=rows))
    if rows:
        _print(rows, options)
    return offline.finish(options, SETTINGS, rows, interrupted)


def measure(llm: offline.OfflineEngine, options: argparse.Namespace, rows: list[Latency]) -> None:
    """Appends one row a layout, each as soon as it is known; one that Ctrl-C cuts short has fewer batches."""
    prompts = offline.PromptSource(options.seed, llm.model_config.vocab_size, options.input_len)
    screen = Console(stderr=True)
    for here in offline.each_layout(llm, options):
        seconds: list[float] = []
        try:
            for _ in track(range(options.num_iters_warmup + options.num_iters), here.layout, console=screen):
                batch = prompts.take(options.batch_size)
                seconds.append(offline.timed_generate(llm, batch, options.output_len)[0])
        finally:
            if counted := seconds[options.num_iters_warmup :]:
                rows.append(latency(here, counted))


def latency(here: offline.InLayout, seconds: list[float]) -> Latency:
    """The mean and the percentiles of the iterations' seconds."""
    percentiles = dict(zip(PERCENTILES, np.percentile(seconds, PERCENTILES).tolist(), strict=True))
    return Latency(
        layout=here.layout,
        switch_ms=here.switch_ms,
        avg_latency=float(np.mean(seconds)),
        latencies=seconds,
        percentiles={str(percent): value for percent, value in percentiles.items()},
    )


def _print(rows: list[Latency], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{options.batch_size} requests of {options.input_len} + {options.output_len} tokens, "
        f"{options.devices} devices; milliseconds"
    )
    table.add_column("layout")
    for heading in ("switched in", "batches", "mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(heading, justify="right")
    for row in rows:
        switched = "-" if row.switch_ms is None else f"{row.switch_ms:,.1f}"
        seconds = (row.avg_latency, *row.percentiles.values())
        table.add_row(row.layout, switched, str(len(row.latencies)), *(f"{1e3 * each:,.1f}" for each in seconds))
    terminal.console().print(table)
