"""The tables of a report: a file's figures as text, chosen by its kind."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fly_jax.bench.metrics import LATENCIES
from fly_jax.bench.result_files import (
    PROVENANCE_KEYS,
    Kind,
    ResultFile,
    Run,
    answered_nothing,
    measured,
    number,
    plain,
    records,
)

# What a sweep is compared by: heading, and key of the run or metric and percentile.
COMPARED: tuple[tuple[str, str | tuple[str, int]], ...] = (
    ("requests/s asked for", "request_rate"), ("completed", "completed"), ("failed", "failed"),
    ("requests/s", "request_throughput"), ("goodput, requests/s", "request_goodput"),
    ("output tokens/s", "output_throughput"), ("TTFT p50 ms", ("ttft", 50)), ("TTFT p90 ms", ("ttft", 90)),
    ("TTFT p99 ms", ("ttft", 99)), ("TPOT p50 ms", ("tpot", 50)), ("TPOT p90 ms", ("tpot", 90)),
    ("TPOT p99 ms", ("tpot", 99)), ("switches", "layout_switches"),
)  # fmt: skip
STATISTICS = ("mean", "median", "std", "p50", "p90", "p99")
MOST_ROWS = 500


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; those of ``numeric`` columns are set to the right."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


def tables_of(file: ResultFile) -> list[Table]:
    """What a reader of this kind of file looks for first, then its settings; empty tables are left out."""
    makers: dict[Kind, Callable[[ResultFile], list[Table]]] = {
        Kind.SWEEP: lambda file: [comparison(file.runs)],
        Kind.SERVE: lambda file: [percentiles(file.values)],
        Kind.SWITCH: lambda file: [switches(file.values)],
        Kind.ROWS: lambda file: [of_records("Figures", records(file.values.get("rows")))],
        Kind.OTHER: lambda _: [],
    }
    return [table for table in (*makers[file.kind](file), scalars(measured(file.values))) if table.rows]


def comparison(runs: Sequence[Run]) -> Table:
    """A row a run; columns that no run has are left out."""
    columns = [(heading, [_compared(run, key) for run in runs]) for heading, key in COMPARED]
    stalls = [_worst(run.values.get("switch_stall_ms")) for run in runs]
    lags = [_cell(_within(run.values.get("schedule_lag_ms"), "p99")) for run in runs]
    columns += [("worst stall ms", stalls), ("schedule lag p99 ms", lags)]
    kept = [(heading, cells) for heading, cells in columns if any(cells)]
    rows = [(run.name, *(cells[index] for _, cells in kept)) for index, run in enumerate(runs)]
    limits = next((f"; goodput: {run.limits}" for run in runs if run.limits), "")
    return _table(f"Runs{limits}", ["run", *(heading for heading, _ in kept)], rows)


def _compared(run: Run, key: str | tuple[str, int]) -> str:
    return _cell(run.values.get(key) if isinstance(key, str) else run.percentile(*key))


def _worst(stalls: object) -> str:
    found = [number(each) for each in stalls] if isinstance(stalls, list) else []
    return _cell(max(found)) if found else ""


def _within(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None


def percentiles(values: Mapping[str, Any]) -> Table:
    """A row a metric, and one a metric and tag where requests carried tags; empty where none was answered."""
    tags = values.get("by_tag")
    parts = {"all": values, **({plain(tag): each for tag, each in tags.items()} if isinstance(tags, Mapping) else {})}
    rows = []
    for metric in LATENCIES:
        for name, part in parts.items():
            cells = [_cell(_within(part, f"{each}_{metric}_ms")) for each in STATISTICS]
            if any(cells):
                rows.append((metric.upper(), name, *([""] * len(cells) if answered_nothing(part) else cells)))
    return _table("Latency, milliseconds", ["metric", "requests", *STATISTICS], rows)


def switches(values: Mapping[str, Any]) -> Table:
    """A row a switch and strategy: the median of its runs."""
    rows = []
    for case in records(values.get("switches")):
        runs = records(case.get("runs"))
        known = {key: [number(each[key]) for each in runs if key in each] for key in (runs[0] if runs else {})}
        medians = {key: statistics.median(found) for key, found in known.items() if not any(map(math.isnan, found))}
        rows.append({**{key: each for key, each in case.items() if key != "runs"}, "times": len(runs), **medians})
    return of_records("Switches: the median of each", rows)


def of_records(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Any list of JSON objects; a column a key that holds scalars or a few numbers by name."""
    flat = [dict(_flat(row)) for row in rows[:MOST_ROWS]]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    if len(rows) > MOST_ROWS:
        title += f" (the first {MOST_ROWS} of {len(rows)})"
    return _table(title, [_words(key) for key in keys], [tuple(_cell(row.get(key)) for key in keys) for row in flat])


def scalars(values: Mapping[str, Any]) -> Table:
    """Every key of a file that holds one value, and of objects in it theirs; provenance is shown elsewhere."""
    found = [(key, _cell(each)) for key, each in _flat(values) if key.split(".")[0] not in PROVENANCE_KEYS]
    return Table("Settings and totals", ("key", "value"), tuple(found), (False, False))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, each in values.items():
        name = before + plain(key)
        if isinstance(each, Mapping):
            if not before:
                yield from _flat(each, name + ".")
        elif not isinstance(each, list):
            yield name, each


def _table(title: str, headings: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    numeric = tuple(all(_reads_as_number(row[index]) for row in rows) for index in range(len(headings)))
    return Table(title, tuple(headings), tuple(rows), numeric)


def _reads_as_number(cell: str) -> bool:
    return cell == "" or number(cell.replace(",", "")) == number(cell.replace(",", ""))


def _words(key: str) -> str:
    return key.replace("_", " ").replace(".", " ")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    """A figure to four digits or whole; nothing for what is not there."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{number(value):,.0f}" if _is_number(value) else plain(value)
