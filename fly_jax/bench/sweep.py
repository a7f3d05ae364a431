"""``python -m fly_jax.bench sweep``: one workload under every layout and policy, on the same server."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from fly_jax.bench import results
from fly_jax.bench.load import run_load
from fly_jax.bench.requests import PlannedRequest
from fly_jax.bench.serve import ServeRun, check, most_common_errors, plan, report, serving
from fly_jax.bench.serving_result import BY_REQUEST, build_result
from fly_jax.config import one_of
from fly_jax.errors import ConfigError
from fly_jax.layout import Layout
from fly_jax.outputs import SwitchStrategy

AUTO, STATIC = "auto", "static"
SWITCH_TIMEOUT_SECONDS = 300
# Of every request, in seconds; the rest of what is known of each is left to ``serve``.
DRAWN = ("start_times", "ttfts")


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a run is made under.

    Attributes:
        layout: the only one, or the one that ``auto`` starts from.
        strategy: of the switches that ``auto`` makes; None: whatever the server was started with.
    """

    layout: str
    policy: str
    strategy: str | None

    def __str__(self) -> str:
        if self.policy == STATIC:
            return self.layout
        return AUTO if self.strategy is None else f"{AUTO} ({self.strategy})"


def run(options: argparse.Namespace) -> int:
    """Runs every configuration and prints, and saves with pictures if asked for, what came of it.

    Returns:
        0; 1 if a configuration answered no request; 130 if it was interrupted.

    Raises:
        ConfigError: an option is wrong, or the server cannot be had.
    """
    checked = check(options)
    _check(options)
    rows: list[dict[str, Any]] = []
    interrupted = False
    for strategy in _strategies(options):
        if interrupted:
            break
        for row in _runs_on_one_server(options, checked, strategy, with_static=not rows):
            rows.append(row)
            interrupted = row["interrupted"]
            if interrupted:
                break
    _print(rows)
    if options.save_result:
        _save(options, checked, rows)
    if interrupted:
        return 130
    return 0 if all(row["completed"] for row in rows) else 1


def _check(options: argparse.Namespace) -> None:
    if min(options.rate_scales) <= 0:
        raise ConfigError(f"--rate-scales must be above 0, got {min(options.rate_scales):g}")
    for strategy in options.strategies or ():
        one_of("--strategies", strategy, tuple(SwitchStrategy))
    if options.strategies and options.self_hosted is None:
        raise ConfigError(
            f"--strategies {' '.join(options.strategies)} needs --self-hosted: a running server has its own already"
        )


def _strategies(options: argparse.Namespace) -> Sequence[str | None]:
    """A server is started with each; a running one has its own."""
    if options.self_hosted is None:
        return (None,)
    return tuple(dict.fromkeys(options.strategies or [each.value for each in SwitchStrategy]))


def _runs_on_one_server(
    options: argparse.Namespace, checked: ServeRun, strategy: str | None, *, with_static: bool
) -> Iterator[dict[str, Any]]:
    """Static layouts are the same under every strategy, so one server runs them."""
    extra = () if strategy is None else ("--switch-strategy", strategy)
    with serving(options, dataclasses.replace(checked, server_arguments=[*checked.server_arguments, *extra])) as server:
        planned = plan(options, checked, server.model)
        first, configurations = _configurations(options, server.target.base_url, strategy, with_static)
        for configuration, scale in itertools.product(configurations, options.rate_scales):
            if not _configure(server.target.base_url, configuration, options.admin_key):
                continue
            sent, narrowed = within_widths(at_rate(planned, scale), configuration)
            _say(f"{configuration}, {scale:g} times the rate: {len(sent)} requests{_narrowed(narrowed)}")
            load = run_load(sent, server.target, checked.load)
            report(load, len(sent))
            result = build_result(load, server.facts(options, checked, planned))
            rate = result["request_rate"]
            yield {
                "configuration": str(configuration),
                **dataclasses.asdict(configuration),
                "rate_scale": scale,
                "narrowed_requests": narrowed,
                **_without_details(result),
                "error_counts": most_common_errors(load.sent.records),
                "request_rate": rate if isinstance(rate, str) else rate * scale,
            }
        _configure(server.target.base_url, Configuration(first, STATIC, None), options.admin_key)


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
    options: argparse.Namespace, base_url: str, strategy: str | None, with_static: bool
) -> tuple[str, list[Configuration]]:
    """The server's present layout, and what to run on it.

    Raises:
        LayoutError: a layout that its devices do not make.
    """
    present = _layout(base_url)
    devices = sum(int(degree) for degree in present.split("+"))
    layouts = [str(Layout.parse(text, devices)) for text in options.layouts or static_layouts(devices)]
    static = [Configuration(layout, STATIC, None) for layout in layouts] if with_static else []
    automatic = [Configuration(layouts[0], AUTO, strategy)] if AUTO in options.policies else []
    return present, [*(static if STATIC in options.policies else ()), *automatic]


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


def _layout(base_url: str) -> str:
    try:
        answer = httpx.get(f"{base_url}/layout", timeout=60, trust_env=False)
        answer.raise_for_status()
        return str(answer.json()["layout"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{base_url} has no GET /layout ({error!r}): a sweep needs a fly-jax server") from error


def _configure(base_url: str, configuration: Configuration, admin_key: str | None) -> bool:
    """Whether the server has such a layout; waits until it is there."""
    body = {"layout": configuration.layout, "policy": configuration.policy}
    headers = {} if admin_key is None else {"Authorization": f"Bearer {admin_key}"}
    answer = httpx.post(
        f"{base_url}/layout", json=body, headers=headers, timeout=SWITCH_TIMEOUT_SECONDS, trust_env=False
    )
    if answer.status_code == 400:
        _say(f"left out {configuration}: {answer.json()['error']['message']}")
        return False
    if answer.is_error:
        raise ConfigError(f"{base_url}/layout refused {configuration} with {answer.status_code}: {answer.text[:200]}")
    return True


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="times in milliseconds; goodput in requests a second that kept all limits")
    headings = ("configuration", "rate", "done", "failed", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99")
    for heading in (*headings, "tokens/s", "goodput", "switches"):
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    for row in rows:
        goodput = row["request_goodput"]
        table.add_row(
            row["configuration"], f"x{row['rate_scale']:g}", str(row["completed"]), str(row["failed"]),
            *(f"{row[f'{percent}_{metric}_ms']:,.1f}" for metric in ("ttft", "tpot") for percent in ("p50", "p99")),
            f"{row['output_throughput']:,.0f}", "-" if goodput is None else f"{goodput:,.2f}",
            str(row["layout_switches"]),
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 160).print(table)


def _save(options: argparse.Namespace, checked: ServeRun, rows: Sequence[dict[str, Any]]) -> None:
    from fly_jax.bench import pictures

    name = (options.result_filename or f"sweep-{Path(checked.workload).stem}").removesuffix(".json")
    of_devices = options.self_hosted is not None
    # The server has its own number of devices, which every layout fills.
    devices = {"num_devices": sum(map(int, rows[0]["layout"].split("+")))} if of_devices and rows else {}
    result = {**checked.metadata, "workload": checked.workload, "seed": options.seed, **devices, "runs": list(rows)}
    path = results.save(options.result_dir, name, result, of_devices=of_devices)
    _say(f"saved as {path}")
    found = pictures.of_sweep({**results.provenance(of_devices=of_devices), **result})
    for written in pictures.write(found, options.result_dir, name):
        _say(f"saved as {written}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
