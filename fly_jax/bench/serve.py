"""``python -m fly_jax.bench serve``: load on a server, and what its clients saw."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fly_jax.bench import results, terminal
from fly_jax.bench.client import Target
from fly_jax.bench.load import LoadResult, run_load
from fly_jax.bench.metrics import LATENCIES
from fly_jax.bench.output_paths import check_file
from fly_jax.bench.requests import RequestRecord
from fly_jax.bench.self_hosted import self_hosted, vocab_size
from fly_jax.bench.serve_plan import plan
from fly_jax.bench.serve_run import ServeRun, check
from fly_jax.bench.served_model import ServedModel, served_model
from fly_jax.bench.serving_result import RunFacts, build_result
from fly_jax.bench.serving_table import table
from fly_jax.bench.workload_files import RANDOM
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.config import one_of
from fly_jax.platform import secret

ERRORS_SHOWN = 5


def run(options: argparse.Namespace) -> int:
    """Runs the load and prints, and saves if asked for, what came of it.

    Returns:
        0; 1 if no request was answered; 130 if it was interrupted.

    Raises:
        ConfigError: an option is wrong, or the server cannot be had.
    """
    checked = check(options)
    shown = tuple(one_of("--percentile-metrics", each, LATENCIES) for each in options.percentile_metrics.split(","))
    saves = options.save_result or options.save_detailed
    if saves:
        # A name that is made up afterwards cannot be taken.
        check_file("--result-dir", options.result_dir / (options.result_filename or "new.json"))
    with serving(options, checked) as server:
        planned = plan(options, checked, server.model, as_text=server.target.is_chat)
        target = server.target
        terminal.say(f"{len(planned.requests)} requests to {target.url(target.endpoint)}, model {target.model}")
        load = run_load(planned.requests, target, checked.load)
    result = build_result(load, facts(options, checked, server, planned), detailed=options.save_detailed)
    report(load, len(planned.requests))
    print(table(result, shown, checked.percentiles))
    if saves:
        # A word of the user's does not go over a figure.
        terminal.say(f"saved as {_save(options, {**checked.metadata, **result})}")
    if load.sent.interrupted:
        return terminal.INTERRUPTED_CODE
    return 0 if result["completed"] else 1


@dataclass(frozen=True, slots=True)
class Server:
    """What requests are sent to."""

    target: Target
    model: ServedModel


def facts(options: argparse.Namespace, checked: ServeRun, server: Server, planned: WorkloadPlan) -> RunFacts:
    """What a result says of a run besides its figures."""
    return RunFacts(
        backend=options.backend,
        model_id=server.target.model,
        workload=checked.workload or RANDOM,
        seed=options.seed,
        request_rate=_planned_rate(checked, planned),
        burstiness=None if checked.has_times else options.burstiness,
        ramp_up=checked.ramp_up,
        max_concurrency=options.max_concurrency,
        goodput=checked.goodput,
        percentiles=checked.percentiles,
        clipped=planned.clipped,
        skipped=planned.skipped,
        label=options.label,
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
    terminal.say(f"starting a server of {options.self_hosted}")
    with self_hosted(options.self_hosted, checked.server_arguments) as url:
        yield _server(options, checked, url)


def _server(options: argparse.Namespace, checked: ServeRun, url: str) -> Server:
    api_key = options.api_key or secret("FLY_JAX_API_KEY") or secret("OPENAI_API_KEY")
    target = Target(
        base_url=url,
        model="",
        endpoint=checked.endpoint,
        api_key=api_key,
        ignore_eos=checked.ignore_eos,
        temperature=options.temperature,
        extra_headers=checked.headers,
        extra_body=checked.extra_body,
    )
    model = served_model(url, options.model, target.headers)
    return Server(dataclasses.replace(target, model=model.name), model)


def _planned_rate(checked: ServeRun, planned: WorkloadPlan) -> float:
    """As asked for; where the workload sets the times, their mean."""
    if not checked.has_times:
        return checked.request_rate
    return len(planned.requests) / planned.seconds if planned.seconds > 0 else math.inf


def report(load: LoadResult, planned: int) -> None:
    """Prints what a table of figures does not hold."""
    records = load.sent.records
    if load.sent.interrupted:
        terminal.say(f"interrupted after {load.duration:.1f} s: {len(records)} of {planned} requests had been sent")
    if not load.has_layouts:
        terminal.say("the server has no GET /layout, so there is no layout timeline")
    uncounted = sum(not record.has_usage for record in records if not record.error)
    if uncounted:
        terminal.say(f"{uncounted} answers came without usage: their tokens are the plan's, and the pieces that came")
    for error, count in most_common_errors(records).items():
        terminal.say(f"{count} requests failed: {error}")


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
        name = f"{result['label'] or result['backend']}-{shown}qps{bound}-{model}-{now}"
    # The devices of this machine are the server's only if we started it.
    of_devices = options.self_hosted is not None
    if of_devices and result["layout_timeline"]:
        # It may use fewer than there are, or more virtual ones than this process has.
        result = {**result, "num_devices": sum(map(int, result["layout_timeline"][0]["layout"].split("+")))}
    return str(results.save(options.result_dir, name.removesuffix(".json"), result, of_devices=of_devices))
