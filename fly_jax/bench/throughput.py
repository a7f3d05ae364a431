"""``throughput``: requests and tokens a second when all requests are there at once, in each layout."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from fly_jax.bench import offline, terminal

# Untimed requests, a device: they touch what the first requests of an engine or of a layout find cold.
WARMUP_PROMPTS_A_DEVICE = 2
# Options that a result file has.
SETTINGS = ("input_len", "output_len", "seed")


@dataclass(frozen=True, slots=True)
class Throughput:
    """One layout's figures, under vLLM's names where it has them.

    Attributes:
        switch_ms: what coming from the layout before took; None in the first.
        elapsed_time: seconds.
        total_num_tokens, tokens_per_second: of prompts and answers.
        output_tokens_per_second: of answers only.
    """

    layout: str
    switch_ms: float | None
    elapsed_time: float
    num_requests: int
    total_num_tokens: int
    total_output_tokens: int
    requests_per_second: float
    tokens_per_second: float
    output_tokens_per_second: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Gives the engine all requests at once, in this process and without a server, and prints how many requests and "
        "tokens a second it completes in each layout. Prompts are random token ids, and every answer has its whole "
        "length. Try: python -m fly_jax.bench throughput --layout 1+1+1+1 2+2 4"
    )
    parser.set_defaults(command=run)
    offline.add_engine_arguments(parser, input_len=128, output_len=64)
    parser.add_argument(
        "--num-prompts", type=int, default=128, help="timed requests in each layout (default: %(default)s)"
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=32,
        help="requests that a group works on at once; the others wait (default: %(default)s)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes, what there is of it also when Ctrl-C ends it.

    Returns:
        0; 130 if it was interrupted.

    Raises:
        ConfigError, LayoutError: an option is wrong; one line that says what to do.
    """
    offline.check(options, ("num_prompts", "max_num_seqs"))
    rows: list[Throughput] = []
    interrupted = offline.was_interrupted(options, options.max_num_seqs, partial(measure, options=options, rows=rows))
    if rows:
        _print(rows, options)
    return offline.finish(options, SETTINGS, rows, interrupted)


def measure(llm: offline.OfflineEngine, options: argparse.Namespace, rows: list[Throughput]) -> None:
    """Appends one row a layout, each as soon as it is known, and says on standard error what runs.

    No bar moves with the requests: drawing it would take time from the engine, which runs in the same process.
    """
    prompts = offline.PromptSource(options.seed, llm.model_config.vocab_size, options.input_len)
    layouts = max(1, len(options.layout))
    for number, here in enumerate(offline.each_layout(llm, options), 1):
        warmup = prompts.take(WARMUP_PROMPTS_A_DEVICE * options.devices)
        terminal.say(
            f"layout {number} of {layouts}, {here.layout}: {options.num_prompts} requests, and {len(warmup)} before "
            "that are not timed"
        )
        offline.timed_generate(llm, warmup, options.output_len)
        elapsed, outputs = offline.timed_generate(llm, prompts.take(options.num_prompts), options.output_len)
        of_prompts = sum(len(each.prompt_token_ids) for each in outputs)
        of_answers = sum(len(each.token_ids) for each in outputs)
        rows.append(throughput(here, elapsed, len(outputs), of_prompts, of_answers))


def throughput(here: offline.InLayout, elapsed: float, requests: int, of_prompts: int, of_answers: int) -> Throughput:
    """The rates of so many requests and tokens in ``elapsed`` seconds."""
    total = of_prompts + of_answers
    return Throughput(
        layout=here.layout,
        switch_ms=here.switch_ms,
        elapsed_time=elapsed,
        num_requests=requests,
        total_num_tokens=total,
        total_output_tokens=of_answers,
        requests_per_second=requests / elapsed,
        tokens_per_second=total / elapsed,
        output_tokens_per_second=of_answers / elapsed,
    )


def _print(rows: list[Throughput], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{options.num_prompts} requests of {options.input_len} + {options.output_len} tokens at once, "
        f"{options.devices} devices"
    )
    for heading in ("layout", "switched in ms", "seconds", "requests/s", "tokens/s", "output tokens/s"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for row in rows:
        rates: tuple[Any, ...] = (row.requests_per_second, row.tokens_per_second, row.output_tokens_per_second)
        switched = "-" if row.switch_ms is None else f"{row.switch_ms:,.1f}"
        table.add_row(row.layout, switched, f"{row.elapsed_time:,.2f}", *(f"{each:,.1f}" for each in rates))
    terminal.console().print(table)
