"""``python -m fly_jax.bench serve``: load on a server, and what its clients saw."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fly_jax.bench import results
from fly_jax.bench.arrivals import RampUp, arrival_times
from fly_jax.bench.client import CHAT_COMPLETIONS, COMPLETIONS, Target
from fly_jax.bench.load import LoadOptions, LoadResult, run_load
from fly_jax.bench.metrics import LATENCIES, parse_goodput
from fly_jax.bench.plan_limits import PlanLimits
from fly_jax.bench.random_prompts import RandomLengths, random_requests
from fly_jax.bench.requests import PlannedRequest, RequestRecord
from fly_jax.bench.self_hosted import self_hosted, split_server_arguments, vocab_size
from fly_jax.bench.served_model import ServedModel, served_model
from fly_jax.bench.serving_result import RunFacts, build_result
from fly_jax.bench.serving_table import table
from fly_jax.config import one_of
from fly_jax.errors import ConfigError
from fly_jax.platform import secret

RANDOM = "random"
DEFAULT_PROMPTS = 1000
DEFAULT_INPUT_LEN = 1024
DEFAULT_OUTPUT_LEN = 128
# Every tokenizer in use has ids up to here.
SMALLEST_VOCABULARY = 1000
ERRORS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ServeRun:
    """The checked options of a run.

    Attributes:
        workload: ``random``, or what ``workloads.plan`` takes.
        request_rate: None: not given.
        base_url: of a running server, without a slash at the end.
        metadata: of the user's own, for the result file.
    """

    workload: str
    request_rate: float | None
    ramp_up: RampUp | None
    load: LoadOptions
    goodput: dict[str, float]
    shown: tuple[str, ...]
    percentiles: tuple[float, ...]
    server_arguments: list[str]
    base_url: str
    endpoint: str
    metadata: dict[str, str]

    @property
    def sets_times(self) -> bool:
        return self.request_rate is not None or self.ramp_up is not None or self.workload == RANDOM


def run(options: argparse.Namespace) -> int:
    """Runs the load and prints, and saves if asked for, what came of it.

    Returns:
        0; 1 if no request was answered; 130 if it was interrupted.

    Raises:
        ConfigError: an option is wrong, or the server cannot be had.
    """
    checked = check(options)
    with serving(options, checked) as server:
        planned = plan(options, checked, server.model, as_text=server.target.is_chat)
        target = server.target
        _say(f"{len(planned)} requests to {target.base_url}{target.endpoint}, model {target.model}")
        load = run_load(planned, target, checked.load)
    result = build_result(load, server.facts(options, checked, planned), detailed=options.save_detailed)
    report(load, len(planned))
    print(table(result, checked.shown, checked.percentiles))
    if options.save_result or options.save_detailed:
        # A word of the user's does not go over a figure.
        _say(f"saved as {_save(options, {**checked.metadata, **result})}")
    if load.sent.interrupted:
        return 130
    return 0 if result["completed"] else 1


def check(options: argparse.Namespace) -> ServeRun:
    """Everything that can be known to be wrong before a server is started or asked.

    Raises:
        ConfigError: the first thing that is.
    """
    for name in ("num_prompts", "vocab_size"):
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
    if options.server_args and options.self_hosted is None:
        raise ConfigError("--server-args needs --self-hosted: a running server has its arguments already")
    ramp_up = _ramp_up(options)
    arrival_times(0, _or(options.request_rate, math.inf), options.burstiness, options.seed, ramp_up)
    RandomLengths(_or(options.random_input_len, 1), _or(options.random_output_len, 1), options.random_range_ratio)
    endpoint = options.endpoint or (CHAT_COMPLETIONS if options.backend == "openai-chat" else COMPLETIONS)
    base_url = options.base_url or f"http://{_bracketed(options.host)}:{options.port}"
    Target(base_url, "", endpoint)
    return ServeRun(
        workload=options.workload or options.dataset_name or RANDOM,
        request_rate=options.request_rate,
        ramp_up=ramp_up,
        load=LoadOptions(options.max_concurrency, options.num_warmups, show_progress=not options.disable_tqdm),
        goodput=parse_goodput(options.goodput),
        shown=tuple(one_of("--percentile-metrics", each, LATENCIES) for each in options.percentile_metrics.split(",")),
        percentiles=tuple(_percentile(each) for each in options.metric_percentiles.split(",")),
        server_arguments=split_server_arguments(options.server_args),
        base_url=base_url.rstrip("/"),
        endpoint=endpoint,
        metadata=_metadata(options.metadata),
    )


def _bracketed(host: str) -> str:
    """As URLs write it: an IPv6 address has colons of its own."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _metadata(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for text, (key, equals, _) in zip(given, pairs, strict=True):
        if not (key and equals):
            raise ConfigError(f"--metadata takes KEY=VALUE, got {text!r}")
    return {key: value for key, _, value in pairs}


def plan(
    options: argparse.Namespace, checked: ServeRun, model: ServedModel, *, as_text: bool = False
) -> list[PlannedRequest]:
    """The requests of a run, in the order of their times.

    Raises:
        ConfigError: random lengths that the model cannot hold, or whatever is wrong with a workload.
    """
    vocabulary = options.vocab_size
    if vocabulary is None:
        vocabulary = SMALLEST_VOCABULARY if options.self_hosted is None else vocab_size(options.self_hosted)
    if checked.workload == RANDOM:
        times = _times(options, checked, options.num_prompts or DEFAULT_PROMPTS)
        lengths = _random_lengths(options, model.max_model_len)
        return random_requests(times, lengths, vocabulary, options.seed, as_text=as_text)
    from fly_jax.bench import workloads

    limits = PlanLimits(_or(model.max_model_len, sys.maxsize), options.num_prompts, vocabulary)
    planned = workloads.plan(checked.workload, dataset_path=options.dataset_path, limits=limits, seed=options.seed)
    if checked.sets_times:
        times = _times(options, checked, len(planned))
        planned = [dataclasses.replace(request, at=at) for request, at in zip(planned, times, strict=True)]
    return sorted(planned, key=lambda request: request.at)


def _times(options: argparse.Namespace, checked: ServeRun, count: int) -> tuple[float, ...]:
    return arrival_times(count, _or(checked.request_rate, math.inf), options.burstiness, options.seed, checked.ramp_up)


def _random_lengths(options: argparse.Namespace, max_model_len: int | None) -> RandomLengths:
    """As given; what is left out is made to fit the model."""
    ratio = options.random_range_ratio
    limit = _or(max_model_len, sys.maxsize)
    outputs = _or(options.random_output_len, max(1, min(DEFAULT_OUTPUT_LEN, limit // 8)))
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


@dataclass(frozen=True, slots=True)
class Server:
    """What requests are sent to."""

    target: Target
    model: ServedModel

    def facts(self, options: argparse.Namespace, checked: ServeRun, planned: Sequence[PlannedRequest]) -> RunFacts:
        """What a result says of a run on it."""
        return RunFacts(
            backend="openai-chat" if self.target.is_chat else "openai",
            model_id=self.target.model,
            workload=checked.workload,
            seed=options.seed,
            request_rate=_planned_rate(checked, planned),
            burstiness=options.burstiness,
            max_concurrency=options.max_concurrency,
            goodput=checked.goodput,
            percentiles=checked.percentiles,
        )


@contextlib.contextmanager
def serving(options: argparse.Namespace, checked: ServeRun) -> Iterator[Server]:
    """The running server, or one that is started and stopped.

    Raises:
        ConfigError: it cannot be had.
    """
    if options.self_hosted is None:
        yield _server(options, checked, checked.base_url)
        return
    # A folder that is none is found here and not by a server that takes seconds to say so.
    vocab_size(options.self_hosted)
    _say(f"starting a server of {options.self_hosted}")
    with self_hosted(options.self_hosted, checked.server_arguments) as url:
        yield _server(options, checked, url)


def _server(options: argparse.Namespace, checked: ServeRun, url: str) -> Server:
    api_key = _or(options.api_key, secret("FLY_JAX_API_KEY"))
    model = served_model(url, options.model, api_key)
    return Server(Target(url, model.name, checked.endpoint, api_key, options.ignore_eos, options.temperature), model)


def _planned_rate(checked: ServeRun, planned: Sequence[PlannedRequest]) -> float:
    """As asked for; where a ramp or a workload sets the times, the mean of what was planned."""
    if checked.request_rate is not None or (checked.ramp_up is None and checked.workload == RANDOM):
        return _or(checked.request_rate, math.inf)
    return len(planned) / planned[-1].at if planned[-1].at > 0 else math.inf


def report(load: LoadResult, planned: int) -> None:
    """Prints what a table of figures does not hold."""
    records = load.sent.records
    if load.sent.interrupted:
        _say(f"interrupted after {load.duration:.1f} s: {len(records)} of {planned} requests had been sent")
    if not load.has_layouts:
        _say("the server has no GET /layout, so there is no layout timeline")
    for error, count in most_common_errors(records).items():
        _say(f"{count} requests failed: {error}")


def most_common_errors(records: Sequence[RequestRecord]) -> dict[str, int]:
    """How many requests ended with each error, the most frequent first."""
    return dict(Counter(record.error for record in records if record.error).most_common(ERRORS_SHOWN))


def _save(options: argparse.Namespace, result: dict[str, Any]) -> str:
    name = options.result_filename
    if name is None:
        bound = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
        rate = result["request_rate"]
        shown = rate if isinstance(rate, str) else f"{rate:g}"
        model = result["model_id"].rpartition("/")[2]
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        name = f"{result['backend']}-{shown}qps{bound}-{model}-{now}"
    # The devices of this machine are the server's only if we started it.
    of_devices = options.self_hosted is not None
    if of_devices and result["layout_timeline"]:
        # It may use fewer than there are, or more virtual ones than this process has.
        result = {**result, "num_devices": sum(map(int, result["layout_timeline"][0]["layout"].split("+")))}
    return str(results.save(options.result_dir, name.removesuffix(".json"), result, of_devices=of_devices))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _say(text: str) -> None:
    print(text, file=sys.stderr)
