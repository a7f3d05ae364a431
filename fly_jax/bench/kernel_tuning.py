"""Timing of settings for the kernels' tuning table."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import jax
from rich.console import Console

from fly_jax.bench.attention_work import Work
from fly_jax.bench.kernel_results import Rates
from fly_jax.bench.kernel_timing import Bench
from kernels_pallas.pallas import PallasBackend
from kernels_pallas.tuning import DECODE_ROWS, Tuning, candidates, table_row

# Batch, context and new tokens of what tunings are compared on.
TUNED_WORK = ((1, 32_768, 1), (64, 2048, 1), (1, 8192, 8192))
SHOWN = 5


def tune(bench: Bench, console: Console, rates: Rates) -> None:
    """Times candidates on a long and on a crowded decode and on a prompt, at each degree.

    After each degree it prints the line of the table that is best at all degrees so far.
    """
    timed: dict[Work, dict[Tuning, float]] = {}
    for tp in bench.options.degrees:
        for batch, context, queries in _tuned_work(bench.options):
            work = bench.one(tp, batch, context, queries)
            timed[work] = _time(bench, work)
            console.print(f"{work}:")
            for tuning, seconds in sorted(timed[work].items(), key=lambda each: each[1])[:SHOWN]:
                share = bench.amount(work) / seconds / bench.best(work, rates)
                console.print(f"  {seconds * 1e6:9.1f} us  {share:6.1%}  {tuning}")
        console.print(best_row(bench.heads.head_dim, bench.device.device_kind, timed), soft_wrap=True)


def _tuned_work(options: argparse.Namespace) -> Sequence[tuple[int, int, int]]:
    """Batch, context and new tokens: those of a serving engine, or of the contexts and batches that are asked for."""
    if not options.contexts:
        return TUNED_WORK
    batches = options.batches or (1,)
    decodes = [(batch, context, 1) for context in options.contexts for batch in batches]
    return [*decodes, *((1, context, context) for context in options.contexts)]


def _time(bench: Bench, work: Work) -> dict[Tuning, float]:
    """Seconds a call; without those for which the chip has not the registers or the memory."""
    chip = bench.device.device_kind
    offered = candidates(chip, work.layout(), bench.heads.group, work.queries)
    tunings = list(itertools.islice(offered, bench.options.candidates))
    interpret = bench.device.platform != "gpu"
    backends = [PallasBackend(chip, interpret=interpret, tuning=each) for each in tunings]
    programs = bench.compile_all([(work, backend) for backend in backends])
    found: dict[Tuning, float] = {}
    for tuning, program in zip(tunings, programs, strict=True):
        try:
            found[tuning] = bench.time(work, program)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    return found


def best_row(head_dim: int, chip: str, timed: dict[Work, dict[Tuning, float]]) -> str:
    """The line for the tuning table that loses least against the best of each piece of work.

    Args:
        timed: seconds of each piece of work with each tuning.
    """
    decode = _best([each for work, each in timed.items() if work.queries == 1], head_dim)
    prefill = _best([each for work, each in timed.items() if work.queries > 1], head_dim)
    if decode is None or prefill is None:
        return "no line of the table can say what was fastest: see the settings above"
    losses = f"{decode[1]:.0%} and {prefill[1]:.0%} slower than the best of each work on {chip}"
    return str(table_row(head_dim, decode[0], prefill[0], losses))


def _best(timed: Sequence[dict[Tuning, float]], head_dim: int) -> tuple[Tuning, float] | None:
    """What a line of the table can say and is slowest by the least, in the geometric mean; and by how much."""
    losses: dict[Tuning, float] = {}
    for tuning in set[Tuning]().union(*timed):
        as_decode = replace(tuning, rows=DECODE_ROWS)
        if all(tuning in each for each in timed) and table_row(head_dim, as_decode, tuning, ""):
            ratios = [math.log(each[tuning] / min(each.values())) for each in timed]
            losses[tuning] = math.expm1(sum(ratios) / len(ratios))
    return min(losses.items(), key=lambda each: each[1]) if losses else None
