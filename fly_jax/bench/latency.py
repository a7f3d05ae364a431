"""``latency``: how long one batch takes from its prompts to its last token, in each layout."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fly_jax.bench import offline, results

PERCENTILES = (10, 25, 50, 75, 90, 99)


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
        "Runs one batch after another, in this process and without HTTP, and measures how long each takes until its "
        "last token. Prompts are random token ids, answers go on past the end-of-sequence token."
    )
    parser.set_defaults(command=run)
    offline.add_engine_arguments(parser, input_len=32, output_len=128)
    parser.add_argument("--batch-size", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--num-iters-warmup", type=int, default=3, help="batches before, in each layout (default: %(default)s)"
    )
    parser.add_argument("--num-iters", type=int, default=10, help="batches a layout that count (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes.

    Raises:
        ConfigError, LayoutError: an option is wrong; one line that says what to do.
    """
    offline.check(options, at_least_one=("batch_size", "num_iters"), at_least_zero=("num_iters_warmup",))
    # A single group has to hold the whole batch, or its last requests would wait for the first.
    with offline.loaded_engine(options, max_num_seqs=options.batch_size) as llm:
        rows = measure(llm, options)
    _print(rows, options)
    if options.output_json is not None:
        names = ("batch_size", "input_len", "output_len", "num_iters_warmup", "num_iters", "seed")
        settings = {name: getattr(options, name) for name in names}
        results.write(options.output_json, offline.result(options, settings, [asdict(row) for row in rows]))
        print(f"written to {options.output_json}")
    return 0


def measure(llm: offline.OfflineEngine, options: argparse.Namespace) -> list[Latency]:
    """One row a layout."""
    prompts = offline.PromptSource(options.seed, llm.model_config.vocab_size, options.input_len)
    rows, screen = [], Console(stderr=True)
    for here in offline.each_layout(llm, options):
        seconds = [
            offline.timed_generate(llm, prompts.take(options.batch_size), options.output_len)[0]
            for _ in track(range(options.num_iters_warmup + options.num_iters), here.layout, console=screen)
        ]
        rows.append(latency(here, seconds[options.num_iters_warmup :]))
    return rows


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
        f"{options.devices} devices, {options.num_iters} times; milliseconds"
    )
    table.add_column("layout")
    for heading in ("switched in", "mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(heading, justify="right")
    for row in rows:
        switched = "-" if row.switch_ms is None else f"{row.switch_ms:,.1f}"
        seconds = (row.avg_latency, *row.percentiles.values())
        table.add_row(row.layout, switched, *(f"{1e3 * each:,.1f}" for each in seconds))
    Console(width=None if Console().is_terminal else 160).print(table)
