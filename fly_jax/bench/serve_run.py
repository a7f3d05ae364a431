"""The options of a load run, checked: everything that can be known to be wrong before a server is started or asked."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fly_jax.bench.arrivals import RampUp, arrival_times
from fly_jax.bench.client import CHAT_COMPLETIONS, COMPLETIONS, Target
from fly_jax.bench.load import LoadOptions
from fly_jax.bench.metrics import parse_goodput
from fly_jax.bench.random_prompts import RandomLengths
from fly_jax.bench.result_files import PROVENANCE_KEYS
from fly_jax.bench.self_hosted import split_server_arguments
from fly_jax.bench.workload_files import KINDS, RANDOM, SHAREGPT
from fly_jax.bench.workloads import kind_of
from fly_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServeRun:
    """The checked options of a run.

    Attributes:
        workload: what ``workloads.plan`` takes; None: random prompts by the options.
        has_times: the workload's own times hold, and not those of a rate or a ramp.
        request_rate: requests a second; infinite: all at once.
        ignore_eos: generate on after an end token.
        base_url: of a running server, without a slash at the end.
        headers, extra_body: of every request.
        metadata: of the user's own, for the result file.
    """

    workload: str | None
    has_times: bool
    request_rate: float
    ramp_up: RampUp | None
    ignore_eos: bool
    load: LoadOptions
    goodput: dict[str, float]
    percentiles: tuple[float, ...]
    server_arguments: list[str]
    base_url: str
    endpoint: str
    headers: dict[str, str]
    extra_body: dict[str, Any]
    metadata: dict[str, str]


def check(options: argparse.Namespace) -> ServeRun:
    """Everything that can be known to be wrong before a server is started or asked.

    Raises:
        ConfigError: the first thing that is.
    """
    for name in ("num_prompts", "vocab_size", "max_model_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.seed < 0:
        raise ConfigError(f"--seed must be at least 0, got {options.seed}")
    if not options.temperature >= 0:
        raise ConfigError(f"--temperature must be at least 0, got {options.temperature:g}")
    if options.workload is not None and options.dataset_name is not None:
        raise ConfigError(
            f"--workload {options.workload} and --dataset-name {options.dataset_name} both say what is sent: give one"
        )
    if options.load_format != "auto" and options.self_hosted is None:
        raise ConfigError("--load-format needs --self-hosted: a running server has its weights already")
    if options.server_args and options.self_hosted is None:
        raise ConfigError("--server-args needs --self-hosted: a running server has its arguments already")
    ramp_up = _ramp_up(options)
    request_rate = math.inf if options.request_rate is None else options.request_rate
    arrival_times(0, request_rate, options.burstiness, options.seed, ramp_up)
    inputs, outputs = (1 if n is None else n for n in (options.random_input_len, options.random_output_len))
    RandomLengths(inputs, outputs, options.random_range_ratio)
    endpoint = options.endpoint or (CHAT_COMPLETIONS if options.backend == "openai-chat" else COMPLETIONS)
    base_url = options.base_url or f"http://{_bracketed(options.host)}:{options.port}"
    Target(base_url, "", endpoint)
    workload, kind = _workload(options)
    return ServeRun(
        workload=workload,
        has_times=options.workload is not None and options.request_rate is None and ramp_up is None,
        request_rate=request_rate,
        ramp_up=ramp_up,
        ignore_eos=kind != SHAREGPT if options.ignore_eos is None else options.ignore_eos,
        load=LoadOptions(options.max_concurrency, options.num_warmups, show_progress=not options.disable_tqdm),
        goodput=parse_goodput(options.goodput),
        percentiles=tuple(_percentile(each) for each in options.metric_percentiles.split(",")),
        server_arguments=_server_arguments(options),
        base_url=base_url.rstrip("/"),
        endpoint=endpoint,
        headers=_pairs("--header", options.header),
        extra_body=_extra_body(options.extra_body),
        metadata=_metadata(options.metadata),
    )


def _server_arguments(options: argparse.Namespace) -> list[str]:
    dummy = [] if options.load_format == "auto" else ["--load-format", options.load_format]
    return [*dummy, *split_server_arguments(options.server_args)]


def _workload(options: argparse.Namespace) -> tuple[str | None, str]:
    """What ``ServeRun.workload`` is to be, and its kind."""
    name = options.workload or options.dataset_name or RANDOM
    if options.workload is None and name == RANDOM:
        if options.dataset_path is not None:
            raise ConfigError(f"random prompts take no --dataset-path, got {options.dataset_path}: give --dataset-name")
        return None, RANDOM
    if options.workload is None and name not in KINDS:
        raise ConfigError(
            f"--dataset-name must be one of {', '.join(KINDS)}, got {name!r}; files of your own: --workload"
        )
    return name, kind_of(name, options.dataset_path)


def _bracketed(host: str) -> str:
    """As URLs write it: an IPv6 address has colons of its own."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for text, (key, equals, _) in zip(given, pairs, strict=True):
        if not (key and equals):
            raise ConfigError(f"{option} takes KEY=VALUE, got {text!r}")
    return {key: value for key, _, value in pairs}


def _metadata(given: Sequence[str]) -> dict[str, str]:
    found = _pairs("--metadata", given)
    for key in found:
        if key in PROVENANCE_KEYS:
            raise ConfigError(f"--metadata {key}={found[key]} would hide what the file says itself: take another key")
    return found


def _extra_body(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON ({error}): {text!r}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"--extra-body must be a JSON object, got {text!r}")
    return fields


def _ramp_up(options: argparse.Namespace) -> RampUp | None:
    given = (options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps)
    if all(each is None for each in given):
        return None
    if any(each is None for each in given):
        raise ConfigError("a ramp needs all of --ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps")
    if options.request_rate is not None:
        raise ConfigError(f"--request-rate {options.request_rate:g} and a ramp both set the rate: give one of them")
    return RampUp(*given)


def _percentile(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ConfigError(f"--metric-percentiles takes numbers from 0 to 100 by commas, got {text!r}")
    return value
