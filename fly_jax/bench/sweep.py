"""``python -m fly_jax.bench sweep``: one workload under every layout and policy."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fly_jax.bench import pictures, results, terminal
from fly_jax.bench.load import run_load
from fly_jax.bench.output_paths import check_file
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.self_hosted import stopping_on_signals
from fly_jax.bench.serve import Server, facts, most_common_errors, report, serving
from fly_jax.bench.serve_plan import plan
from fly_jax.bench.serve_run import ServeRun, check
from fly_jax.bench.server_layouts import Configuration, ServerLayouts
from fly_jax.bench.serving_result import BY_REQUEST, build_result
from fly_jax.bench.workload_files import RANDOM
from fly_jax.bench.workload_plan import WorkloadPlan
from fly_jax.errors import ConfigError
from fly_jax.layout import Layout
from fly_jax.outputs import SwitchStrategy
from fly_jax.platform import secret
from fly_jax.policy.names import AUTO, STATIC

# Of every request, in seconds; the rest of what is known of each is left to ``serve``.
DRAWN = ("start_times", "ttfts")
# What ``--rate-scales`` scales of a result.
RATES = ("request_rate", "ramp_up_start_rps", "ramp_up_end_rps")


def run(options: argparse.Namespace) -> int:
    """Runs every configuration and prints, and saves with pictures if asked for, what came of it.

    What has been measured is printed and saved however the sweep ends.

    Returns:
        0; 1 if a configuration answered no request, or there was none to run; 130 if a run was interrupted.

    Raises:
        ConfigError: an option is wrong, or the server cannot be had, or not any longer.
    """
    checked = check(options)
    _check(options, checked)
    rows: list[dict[str, Any]] = []
    try:
        with stopping_on_signals():
            _sweep(options, checked, rows)
    finally:
        if rows:
            _keep(options, checked, rows)
    if not rows:
        terminal.say("nothing was measured: the server has none of these layouts")
        return 1
    if rows[-1]["interrupted"]:
        return terminal.INTERRUPTED_CODE
    return 0 if all(row["completed"] for row in rows) else 1


def _check(options: argparse.Namespace, checked: ServeRun) -> None:
    for scale in options.rate_scales:
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"--rate-scales must be finite and above 0, got {scale:g}")
    all_at_once = not checked.has_times and checked.ramp_up is None and math.isinf(checked.request_rate)
    if all_at_once and options.rate_scales != [1]:
        scales = " ".join(f"{scale:g}" for scale in options.rate_scales)
        raise ConfigError(
            f"--rate-scales {scales}: there is no rate, since all is sent at once: give --workload or --request-rate"
        )
    if options.strategies and AUTO not in options.policies:
        raise ConfigError(
            f"--strategies {' '.join(options.strategies)} needs auto, and --policies is {' '.join(options.policies)}: "
            "only auto switches"
        )
    if options.strategies and options.self_hosted is None:
        raise ConfigError(
            f"--strategies {' '.join(options.strategies)} needs --self-hosted: a running server has its own already"
        )
    if options.save_result:
        check_file("--result-dir", options.result_dir / f"{_file_name(options, checked)}.json")
        pictures.require_matplotlib()


def _strategies(options: argparse.Namespace) -> Sequence[str | None]:
    """A server is started with each; a running one has its own, and one that never switches needs none."""
    if options.self_hosted is None or AUTO not in options.policies:
        return (None,)
    return tuple(dict.fromkeys(options.strategies or [each.value for each in SwitchStrategy]))


def _sweep(options: argparse.Namespace, checked: ServeRun, rows: list[dict[str, Any]]) -> None:
    """Appends to ``rows``, which the caller has even if this raises; returns after a run that was interrupted."""
    for index, strategy in enumerate(_strategies(options)):
        extra = () if strategy is None else ("--switch-strategy", strategy)
        arguments = [*checked.server_arguments, *extra]
        with serving(options, dataclasses.replace(checked, server_arguments=arguments)) as server:
            # Static layouts are the same under every strategy, so the first server runs them.
            _runs_on_one_server(options, checked, server, strategy, with_static=index == 0, rows=rows)
        if rows and rows[-1]["interrupted"]:
            return


def _runs_on_one_server(
    options: argparse.Namespace,
    checked: ServeRun,
    server: Server,
    strategy: str | None,
    *,
    with_static: bool,
    rows: list[dict[str, Any]],
) -> None:
    planned = plan(options, checked, server.model, as_text=server.target.is_chat)
    admin_key = secret("FLY_JAX_ADMIN_KEY") if options.admin_key is None else options.admin_key
    layouts = ServerLayouts(server.target.base_url, admin_key)
    found = layouts.present()
    configurations = _configurations(options, found.layout, strategy, with_static)
    # One of our own is stopped in any case.
    with layouts.restored(found) if options.self_hosted is None else contextlib.nullcontext():
        for configuration, scale in itertools.product(configurations, options.rate_scales):
            if layouts.configure(configuration):
                rows.append(_row(options, checked, server, planned, configuration, scale))
                if rows[-1]["interrupted"]:
                    return


def _row(
    options: argparse.Namespace,
    checked: ServeRun,
    server: Server,
    planned: WorkloadPlan,
    configuration: Configuration,
    scale: float,
) -> dict[str, Any]:
    """Sends the load to a server that is configured, and returns what is kept of the result."""
    sent, narrowed = within_widths(at_rate(planned.requests, scale), configuration)
    terminal.say(f"{configuration}, {scale:g} times the rate: {len(sent)} requests{_narrowed(narrowed)}")
    load = run_load(sent, server.target, checked.load)
    report(load, len(sent))
    result = build_result(load, facts(options, checked, server, planned))
    rates = {key: result[key] for key in RATES if isinstance(result.get(key), float)}
    return {
        "configuration": str(configuration),
        **dataclasses.asdict(configuration),
        "rate_scale": scale,
        "narrowed_requests": narrowed,
        **_without_details(result),
        "error_counts": most_common_errors(load.sent.records),
        **{key: rate * scale for key, rate in rates.items()},
    }


def _without_details(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run, and of its requests what pictures are drawn from.

    Every gap between tokens of two dozen runs makes a file of 15 MB, which nobody reads or commits.
    """
    figures = {key: value for key, value in result.items() if key not in BY_REQUEST}
    return {**figures, **{key: [round(each, 4) for each in result[key]] for key in DRAWN}}


def at_rate(planned: Sequence[PlannedRequest], scale: float) -> list[PlannedRequest]:
    """The same requests, ``scale`` times as many a second."""
    return [dataclasses.replace(request, at=request.at / scale) for request in planned]


def within_widths(planned: Sequence[PlannedRequest], configuration: Configuration) -> tuple[list[PlannedRequest], int]:
    """The requests as a pinned layout can take them, and how many had to give up the width that they ask for.

    A server refuses a request that asks for a wider group than its pinned layout has; a user of such a server would not
    ask. The policy makes the group, so there nothing changes.
    """
    if configuration.policy != STATIC:
        return list(planned), 0
    widest = max(map(int, configuration.layout.split("+")))
    sent = [
        dataclasses.replace(request, tensor_parallel_size=None)
        if request.tensor_parallel_size is not None and request.tensor_parallel_size > widest
        else request
        for request in planned
    ]
    return sent, sum(before is not after for before, after in zip(planned, sent, strict=True))


def _narrowed(count: int) -> str:
    return f", {count} of them without the width that they ask for" if count else ""


def _configurations(
    options: argparse.Namespace, present: str, strategy: str | None, with_static: bool
) -> list[Configuration]:
    """What to run on a server whose present layout is this.

    Raises:
        LayoutError: a layout that its devices do not make.
    """
    devices = sum(int(degree) for degree in present.split("+"))
    layouts = [str(Layout.parse(text, devices)) for text in options.layouts or static_layouts(devices)]
    static = [Configuration(layout, STATIC, None) for layout in layouts] if with_static else []
    automatic = [Configuration(layouts[0], AUTO, strategy)] if AUTO in options.policies else []
    return [*(static if STATIC in options.policies else ()), *automatic]


def static_layouts(devices: int) -> list[str]:
    """Every mix of power-of-two degrees that fills the devices, the narrowest first; mirror images are one."""

    def mixes(left: int, widest: int) -> Iterator[tuple[int, ...]]:
        if left == 0:
            yield ()
        degree = widest
        while degree >= 1:
            if degree <= left:
                yield from ((degree, *rest) for rest in mixes(left - degree, degree))
            degree //= 2

    widest = 1 << (devices.bit_length() - 1)
    return ["+".join(map(str, mix)) for mix in sorted(mixes(devices, widest), key=lambda mix: (mix[0], -len(mix)))]


def _keep(options: argparse.Namespace, checked: ServeRun, rows: Sequence[dict[str, Any]]) -> None:
    """Files go first: after a hangup the terminal cannot be written to."""
    try:
        if options.save_result:
            _save(options, checked, rows)
    finally:
        _print(rows)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="times in milliseconds; goodput in requests a second that kept all limits")
    headings = ("configuration", "rate", "done", "failed", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99")
    for heading in (*headings, "tokens/s", "goodput", "switches"):
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    for row in rows:
        goodput = row["request_goodput"]
        latencies = (row[f"{percent}_{metric}_ms"] for metric in ("ttft", "tpot") for percent in ("p50", "p99"))
        table.add_row(
            row["configuration"], f"x{row['rate_scale']:g}", str(row["completed"]), str(row["failed"]),
            # Where nothing was answered they are 0, which would be the fastest.
            *(f"{each:,.1f}" if row["completed"] else "-" for each in latencies),
            f"{row['output_throughput']:,.0f}", "-" if goodput is None else f"{goodput:,.2f}",
            str(row["layout_switches"]),
        )  # fmt: skip
    terminal.console().print(table)


def _file_name(options: argparse.Namespace, checked: ServeRun) -> str:
    """Without its ending."""
    default = f"{options.label or 'sweep'}-{Path(checked.workload or RANDOM).stem}"
    return str(options.result_filename or default).removesuffix(".json")


def _save(options: argparse.Namespace, checked: ServeRun, rows: Sequence[dict[str, Any]]) -> None:
    name = _file_name(options, checked)
    of_devices = options.self_hosted is not None
    # The server has its own number of devices, which every layout fills.
    devices = {"num_devices": sum(map(int, rows[0]["layout"].split("+")))} if of_devices else {}
    result = {
        **checked.metadata,
        "workload": checked.workload or RANDOM,
        "seed": options.seed,
        **devices,
        "runs": list(rows),
    }
    path = results.save(options.result_dir, name, result, of_devices=of_devices)
    found = pictures.of_sweep({**results.provenance(of_devices=of_devices), **result})
    for written in (path, *pictures.write(found, options.result_dir, name)):
        terminal.say(f"saved as {written}")
