"""What a load run sends: random prompts by the options, or a workload."""

from __future__ import annotations

import argparse
import dataclasses

from fly_jax.bench import terminal, workloads
from fly_jax.bench.arrivals import arrival_times
from fly_jax.bench.plan_limits import UNKNOWN_LEN, PlanLimits
from fly_jax.bench.random_prompts import RandomLengths, random_requests
from fly_jax.bench.self_hosted import vocab_size
from fly_jax.bench.serve_run import ServeRun
from fly_jax.bench.served_model import ServedModel
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.errors import ConfigError

DEFAULT_PROMPTS = 1000
DEFAULT_INPUT_LEN = 1024
DEFAULT_OUTPUT_LEN = 128
# Every tokenizer in use has ids up to here.
SMALLEST_VOCABULARY = 1000


def plan(options: argparse.Namespace, checked: ServeRun, model: ServedModel, *, as_text: bool = False) -> WorkloadPlan:
    """The requests of a run, in the order of their times; prints what a workload lost to the model's limits.

    Args:
        as_text: the endpoint takes no token ids.

    Raises:
        ConfigError: random lengths that the model cannot hold, or whatever is wrong with a workload.
    """
    vocabulary = options.vocab_size
    if vocabulary is None:
        vocabulary = SMALLEST_VOCABULARY if options.self_hosted is None else vocab_size(options.self_hosted)
    longest = options.max_model_len or model.max_model_len or UNKNOWN_LEN
    if checked.workload is None:
        times = _times(options, checked, options.num_prompts or DEFAULT_PROMPTS)
        lengths = _random_lengths(options, longest)
        return WorkloadPlan(tuple(random_requests(times, lengths, vocabulary, options.seed, as_text=as_text)), longest)
    number = options.num_prompts or (DEFAULT_PROMPTS if options.workload is None else None)
    limits = PlanLimits(longest, number, vocabulary, as_text)
    planned = workloads.plan(checked.workload, dataset_path=options.dataset_path, limits=limits, seed=options.seed)
    terminal.say(planned.summary())
    if checked.has_times:
        return planned
    times = _times(options, checked, len(planned.requests))
    timed = (dataclasses.replace(request, at=at) for request, at in zip(planned.requests, times, strict=True))
    return dataclasses.replace(planned, requests=tuple(timed))


def _times(options: argparse.Namespace, checked: ServeRun, count: int) -> tuple[float, ...]:
    return arrival_times(count, checked.request_rate, options.burstiness, options.seed, checked.ramp_up)


def _random_lengths(options: argparse.Namespace, limit: int) -> RandomLengths:
    """As given; what is left out is made to fit the model."""
    ratio = options.random_range_ratio
    outputs = options.random_output_len or max(1, min(DEFAULT_OUTPUT_LEN, limit // 8))
    if options.random_input_len is None:
        lengths = RandomLengths.fitting(limit, DEFAULT_INPUT_LEN, outputs, ratio)
    else:
        lengths = RandomLengths(options.random_input_len, outputs, ratio)
    if lengths.longest > limit:
        raise ConfigError(
            f"random requests would have up to {lengths.longest} tokens and the model holds {limit}: lower "
            "--random-input-len, --random-output-len or --random-range-ratio"
        )
    return lengths
