"""Pictures of serving runs. Every function returns a matplotlib figure; :func:`write` makes PNG and SVG of it.

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart; marks and line styles
differ too, so that a picture also reads in black and white.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fly_jax.bench.result_files import Run, measured, number, plain, provenance_line, runs_of, short_layout
from fly_jax.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
GREY = "#767676"
PERCENTS = (50, 90, 99)
METRICS = {"ttft": "time to first token", "tpot": "time per output token"}
# Axes of figures that differ by more than this factor are logarithmic.
LINEAR_FACTOR = 30
# Widths that the load is counted in, seconds; the first that needs no more than so many bins.
BIN_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
MOST_BINS = 80
MOST_RATE_TICKS = 6
LABEL_CHARACTERS = 30
SOURCE_CHARACTERS_AN_INCH = 21
STYLE: Any = {
    "svg.hashsalt": "fly-jax",
    "svg.fonttype": "path",
    "text.parse_math": False,  # names are names: a dollar sign in one is no formula
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,  # long enough to tell line styles apart
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def require_matplotlib() -> None:
    """
    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib, which is not installed: pip install 'fly-jax[bench]'")


def of_sweep(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Every picture of a sweep's result, by name: ``latency``, ``goodput``, ``timeline-...`` of each run that switched.

    A picture for which the file has no figures is left out.
    """
    runs, source = runs_of(result), provenance_line(result)
    workload = plain(result.get("workload") or "")
    pictures = {"latency": latency(runs, workload, source), "goodput": goodput(runs, workload, source)}
    for run in (run for run in runs if run.changes):
        # The name is what distinguishes it, in the title and as a file.
        named = replace(run, name=f"{run.name}, {run.rate:.3g} requests/s") if varied_load(runs) else run
        name = f"timeline-{_slug(named.name.removesuffix(' requests/s'))}"
        pictures[_unused(name, pictures)] = timeline(named, workload, source)
    return {name: figure for name, figure in pictures.items() if figure is not None}


def of_run(run: Run) -> dict[str, Figure]:
    """The pictures of one serving run: percentiles, by tag too if it has tags, and the timeline."""
    source, workload = provenance_line(run.values), plain(run.values.get("workload") or "")
    parts = (replace(run, name="all requests"), *_by_tag(run))
    pictures = {"latency": latency(parts, workload, source), "timeline": timeline(run, workload, source)}
    return {name: figure for name, figure in pictures.items() if figure is not None}


def _by_tag(run: Run) -> tuple[Run, ...]:
    tags = run.values.get("by_tag")
    found = {tag: each for tag, each in tags.items() if isinstance(each, Mapping)} if isinstance(tags, Mapping) else {}
    return tuple(Run(plain(tag) or "without a tag", run.rate, (), (), measured(each)) for tag, each in found.items())


def varied_load(runs: Sequence[Run]) -> bool:
    """Whether runs of the same name differ in the load, so that figures are drawn over it."""
    rates = [run.rate for run in runs]
    return all(math.isfinite(rate) for rate in rates) and len(set(rates)) > 1


def latency(runs: Sequence[Run], workload: str, source: str) -> Figure | None:
    """p50, p90 and p99 of TTFT and TPOT: over the load if it varies, otherwise for each run.

    A run that answered nothing keeps its place and has no points.
    """
    known = [metric for metric in METRICS if any(math.isfinite(run.percentile(metric, 50)) for run in runs)]
    if not known:
        return None
    with _style():
        draw = _over_load if varied_load(runs) else _by_run
        return draw(runs, known, workload, source)


def _over_load(runs: Sequence[Run], metrics: Sequence[str], workload: str, source: str) -> Figure:
    figure = _figure(9.0, 0.9 + 2.3 * len(metrics), f"Latency over load{_of(workload)}", source)
    grid = figure.subplots(len(metrics), len(PERCENTS), squeeze=False, sharex=True, sharey="row")
    for row, metric in enumerate(metrics):
        for column, percent in enumerate(PERCENTS):
            axes = grid[row][column]
            axes.set_title(f"{metric.upper()}, p{percent}")
            _lines(axes, runs, [run.percentile(metric, percent) for run in runs])
        _scale(grid[row][0], "y", [run.percentile(metric, percent) for run in runs for percent in PERCENTS])
        grid[row][0].set_ylabel(f"{METRICS[metric]} (ms)")
    for axes in grid[-1]:
        _mark_rates(axes, runs)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def _lines(axes: Axes, runs: Sequence[Run], values: Sequence[float]) -> None:
    """One line a name, over the rate."""
    for index, name in enumerate(_names(runs)):
        points = sorted((run.rate, y) for run, y in zip(runs, values, strict=True) if run.name == name)
        axes.plot(
            [x for x, _ in points], [y for _, y in points], label=_label(name), color=PALETTE[index % len(PALETTE)],
            marker=MARKERS[index % len(MARKERS)], linestyle=LINES[index % len(LINES)], markersize=5,
        )  # fmt: skip


def _mark_rates(axes: Axes, runs: Sequence[Run]) -> None:
    """A tick at each load that was measured, where they are few."""
    axes.set_xlabel("requests/s asked for")
    rates = sorted({run.rate for run in runs})
    if len(rates) <= MOST_RATE_TICKS:
        axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates])


def _by_run(runs: Sequence[Run], metrics: Sequence[str], workload: str, source: str) -> Figure:
    figure = _figure(9.0, 1.5 + 0.32 * len(runs), f"Latency{_of(workload)}", source)
    grid = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    rows = np.arange(len(runs))
    for axes, metric in zip(grid, metrics, strict=True):
        values = np.array([[run.percentile(metric, percent) for percent in PERCENTS] for run in runs])
        for row, known in enumerate(values[index][~np.isnan(values[index])] for index in rows):
            axes.hlines(row, *(known.min(), known.max()) if len(known) else (0, 0), color=GREY, linewidth=1)
        for column, percent in enumerate(PERCENTS):
            axes.plot(
                values[:, column], rows, label=f"p{percent}", color=PALETTE[column], marker=MARKERS[column],
                linestyle="none", markersize=6,
            )  # fmt: skip
        axes.set_title(f"{metric.upper()}: {METRICS[metric]}")
        axes.set_xlabel("ms")
        _scale(axes, "x", values.ravel())
        axes.grid(False, axis="y")
    grid[0].set_yticks(rows, [_label(run.name) for run in runs])
    grid[0].set_ylim(len(runs) - 0.5, -0.5)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def goodput(runs: Sequence[Run], workload: str, source: str) -> Figure | None:
    """Requests a second within the limits beside all that completed; None if no run was given limits."""
    if not any(math.isfinite(run.number("request_goodput")) for run in runs):
        return None
    with _style():
        return _goodput_lines(runs, workload, source) if varied_load(runs) else _goodput_bars(runs, workload, source)


def _goodput_lines(runs: Sequence[Run], workload: str, source: str) -> Figure:
    figure = _figure(6.5, 3.6, f"Goodput over load{_of(workload)}", source)
    axes = figure.subplots()
    rates = sorted({run.rate for run in runs})
    axes.plot(rates, rates, color=GREY, linewidth=1, label="all that are asked for")
    _lines(axes, runs, [run.number("request_goodput") for run in runs])
    _mark_rates(axes, runs)
    axes.set_ylabel(f"requests/s within {_limits(runs)}")
    axes.set_ylim(bottom=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _goodput_bars(runs: Sequence[Run], workload: str, source: str) -> Figure:
    figure = _figure(7.5, 1.5 + 0.4 * len(runs), f"Goodput{_of(workload)}", source)
    axes, rows = figure.subplots(), np.arange(len(runs))
    completed = [run.number("request_throughput") for run in runs]
    good = [run.number("request_goodput") for run in runs]
    axes.barh(rows, completed, 0.7, color="#D9D9D9", edgecolor=GREY, linewidth=0.8, label="completed")
    bars = axes.barh(rows, good, 0.42, color=PALETTE[0], label=f"within {_limits(runs)}")
    axes.bar_label(bars, [f"{each:,.2f}" if math.isfinite(each) else "" for each in good], padding=3)
    axes.set_yticks(rows, [_label(run.name) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    widest = max(_finite(each) for each in (*completed, *good))
    axes.set_xlim(0, 1.15 * widest or 1)  # room for a figure beside the longest bar
    axes.set_xlabel("requests/s")
    axes.grid(False, axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _limits(runs: Sequence[Run]) -> str:
    """In words for a label; runs side by side have the same ones."""
    return next((run.limits for run in runs if run.limits), "the limits")


def timeline(run: Run, workload: str, source: str) -> Figure | None:
    """Requests a second as they were sent, over the layout that was in force; None if the file has not both."""
    if not run.start_times or not run.timeline:
        return None
    with _style():
        figure = _figure(9.0, 3.4 + 0.2 * len(_layouts(run)), f"Load and layout: {run.name}{_of(workload)}", source)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 0.6 + 0.35 * len(_layouts(run))])
        end = max(run.start_times[-1], run.timeline[-1].at, _finite(run.number("duration")))
        _draw_load(above, run, end)
        _draw_layouts(below, run, end)
        for change in run.changes:
            for axes in (above, below):
                axes.axvline(change.at, color="black", linestyle="--", linewidth=0.8)
    return figure


def _draw_load(axes: Axes, run: Run, end: float) -> None:
    width = next((width for width in BIN_SECONDS if end <= width * MOST_BINS), BIN_SECONDS[-1])
    edges = np.arange(0, max(1, math.ceil(end / width)) + 1) * width
    counts, _ = np.histogram(run.start_times, edges)
    axes.stairs(counts / width, edges, fill=True, color="#BFD9EA")
    axes.stairs(counts / width, edges, color=PALETTE[0], linewidth=1.2)
    axes.set_ylabel("requests/s sent")
    axes.set_ylim(bottom=0)
    switched = f"{len(run.changes)} switches" if len(run.changes) != 1 else "1 switch"
    axes.set_title(f"Load, in bins of {width:g} s; {switched}{_worst_stall(run)}")


def _worst_stall(run: Run) -> str:
    stalls = run.values.get("switch_stall_ms")
    found = [_finite(number(each)) for each in stalls] if isinstance(stalls, list) else []
    return f", the longest gap of a stream at one: {max(found):,.0f} ms" if found else ""


def _draw_layouts(axes: Axes, run: Run, end: float) -> None:
    layouts = _layouts(run)
    ends = [*(each.at for each in run.timeline[1:]), end]
    for row, layout in enumerate(layouts):
        spans = [
            (max(0.0, each.at), until - max(0.0, each.at))
            for each, until in zip(run.timeline, ends, strict=True)
            if each.layout == layout
        ]
        axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=PALETTE[row % len(PALETTE)], label=layout)
    axes.set_yticks(range(len(layouts)), [short_layout(layout) for layout in layouts])
    axes.set_ylim(len(layouts) - 0.5, -0.5)
    axes.set_ylabel("layout")
    axes.set_xlabel("seconds from the start of the run; dashed: the layout changes")
    axes.set_xlim(0, end or 1)
    axes.grid(False, axis="y")


def _layouts(run: Run) -> list[str]:
    """Those that the run was in, narrow groups first."""
    present = dict.fromkeys(each.layout for each in run.timeline)
    return sorted(present, key=lambda layout: (-layout.count("+"), layout))


def _figure(width: float, height: float, title: str, source: str) -> Figure:
    """An empty figure with a title above and the source of its figures below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
    below = textwrap.fill(source, int(width * SOURCE_CHARACTERS_AN_INCH))
    figure.supxlabel(below, x=0.01, ha="left", fontsize=6.5, color=GREY)
    return figure


def _scale(axes: Axes, which: str, values: Sequence[float] | np.ndarray[Any, Any]) -> None:
    """From zero, or logarithmic where small figures could not be told from zero; plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [each for each in values if math.isfinite(each) and each > 0]
    axis = axes.xaxis if which == "x" else axes.yaxis
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    if positive and max(positive) > LINEAR_FACTOR * min(positive):
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_minor_formatter(NullFormatter())
    elif which == "x":
        axes.set_xlim(left=0)
    else:
        axes.set_ylim(bottom=0)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.name for run in runs))


def _of(workload: str) -> str:
    return f", workload {workload}" if workload else ""


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _label(name: str) -> str:
    """The end of a long name: what precedes it is usually the maker's."""
    return name if len(name) <= LABEL_CHARACTERS else "..." + name[-LABEL_CHARACTERS:]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def _unused(name: str, taken: Mapping[str, object]) -> str:
    return next(each for each in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if each not in taken)


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def write(pictures: Mapping[str, Figure], folder: Path, stem: str) -> list[Path]:
    """Writes ``stem-name.png`` and ``stem-name.svg`` of each picture and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in pictures.items():
        png, vector = (folder / f"{stem}-{name}.{ending}" for ending in ("png", "svg"))
        with _style():
            figure.savefig(png, format="png")
        vector.write_bytes(svg(figure))
        paths += [png, vector]
    return paths
