"""Pictures hold the figures of the file that they are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from fly_jax.bench import pictures
from fly_jax.bench.result_files import Kind, ResultFile, Run, provenance_line, runs_of
from tests.fly_jax.bench.sample_results import PROVENANCE, serve_result, sweep_result, switching_run

RATES = (1.0, 2.0, 8.0)


def one_run(values: dict[str, Any]) -> Run:
    return ResultFile("x.json", Kind.SERVE, values).runs[0]


def drawn(figure: Figure | None) -> list[Axes]:
    assert figure is not None
    return figure.axes


def tick_labels(axes: Axes, which: str = "y") -> list[str]:
    return [each.get_text() for each in (axes.yaxis if which == "y" else axes.xaxis).get_ticklabels()]


def texts(figure: Figure) -> str:
    return "\n".join(each.get_text() for each in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_percentiles_of_each_layout_are_where_the_file_has_them() -> None:
    sweep = sweep_result()
    axes_of = dict(zip(("ttft", "tpot"), drawn(pictures.of_sweep(sweep)["latency"]), strict=True))
    for metric, axes in axes_of.items():
        assert axes.get_title(loc="left").startswith(metric.upper())
        assert axes.get_xlabel() == "ms"
        by_label = {str(line.get_label()): line for line in axes.get_lines()}
        assert list(by_label) == ["p50", "p90", "p99"]
        for percent, line in by_label.items():
            assert list(line.get_xdata()) == [run[f"{percent}_{metric}_ms"] for run in sweep["runs"]]
            assert list(line.get_ydata()) == [0, 1, 2, 3]
            low, high = axes.get_xlim()
            assert all(low <= x <= high for x in line.get_xdata())
    assert tick_labels(axes_of["ttft"]) == ["1+1+1+1", "2+2", "4", "auto, migrate"]


def test_over_several_loads_each_layout_is_a_line() -> None:
    sweep = sweep_result(RATES)
    axes = drawn(pictures.of_sweep(sweep)["latency"])
    titles = [each.get_title(loc="left") for each in axes]
    assert titles == ["TTFT, p50", "TTFT, p90", "TTFT, p99", "TPOT, p50", "TPOT, p90", "TPOT, p99"]
    assert [each.get_xlabel() for each in axes[3:]] == ["requests/s asked for"] * 3
    assert [axes[0].get_ylabel(), axes[3].get_ylabel()] == ["time to first token (ms)", "time per output token (ms)"]
    for panel, title in zip(axes, titles, strict=True):
        metric, percent = title.lower().split(", ")
        lines = {str(line.get_label()): line for line in panel.get_lines()}
        assert list(lines) == ["1+1+1+1", "2+2", "4", "auto, migrate"]
        wanted = [run[f"{percent}_{metric}_ms"] for run in sweep["runs"] if run["layout"] == "2+2"]
        assert list(lines["2+2"].get_xdata()) == list(RATES)
        assert list(lines["2+2"].get_ydata()) == wanted


def test_series_differ_in_colour_and_in_mark() -> None:
    runs = [{**serve_result(rate=rate), "layout": f"{n}"} for n in range(8) for rate in (1.0, 2.0)]
    lines = drawn(pictures.of_sweep({"runs": runs})["latency"])[0].get_lines()
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 8


def test_the_load_is_logarithmic_only_where_figures_are_far_apart() -> None:
    near = drawn(pictures.of_sweep(sweep_result())["latency"])[0]
    far_apart = sweep_result()
    far_apart["runs"][0]["p99_ttft_ms"] = 50_000.0
    far = drawn(pictures.of_sweep(far_apart)["latency"])[0]
    assert (near.get_xscale(), near.get_xlim()[0]) == ("linear", 0)
    assert far.get_xscale() == "log"


def test_goodput_is_a_bar_beside_all_that_completed() -> None:
    sweep = sweep_result()
    sweep["runs"][1]["request_goodput"] = 1.25
    (axes,) = drawn(pictures.of_sweep(sweep)["goodput"])
    completed, good = axes.containers[:2]
    assert [bar.get_width() for bar in completed] == [run["request_throughput"] for run in sweep["runs"]]
    assert [bar.get_width() for bar in good] == [run["request_goodput"] for run in sweep["runs"]]
    assert tick_labels(axes) == ["1+1+1+1", "2+2", "4", "auto, migrate"]
    assert axes.get_xlabel() == "requests/s"
    assert "1.25" in [text.get_text() for text in axes.texts]


def test_goodput_over_several_loads_is_a_line_a_layout() -> None:
    sweep = sweep_result(RATES)
    (axes,) = drawn(pictures.of_sweep(sweep)["goodput"])
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert list(lines) == ["all that are asked for", "1+1+1+1", "2+2", "4", "auto, migrate"]
    assert list(lines["all that are asked for"].get_ydata()) == list(RATES)
    assert tick_labels(axes, "x") == ["1", "2", "8"]
    pinned = [run for run in sweep["runs"] if (run["layout"], run["policy"]) == ("4", "static")]
    assert list(lines["4"].get_ydata()) == [run["request_goodput"] for run in pinned]


def test_goodput_says_what_the_limits_are_if_the_file_does() -> None:
    def words(sweep: dict[str, Any]) -> list[str]:
        (axes,) = drawn(pictures.of_sweep(sweep)["goodput"])
        return [axes.get_ylabel(), *axes.get_legend_handles_labels()[1]]

    for rates, before in (((4.0,), ""), (RATES, "requests/s ")):
        sweep = sweep_result(rates)
        assert f"{before}within the limits" in words(sweep)
        for run in sweep["runs"]:
            run["goodput_limits_ms"] = {"ttft": 500.0, "tpot": 37.5}
        assert f"{before}within TTFT 500 ms, TPOT 37.5 ms" in words(sweep)


def test_without_limits_there_is_no_goodput() -> None:
    sweep = sweep_result()
    for run in sweep["runs"]:
        run["request_goodput"] = None
    assert "goodput" not in pictures.of_sweep(sweep)


def test_the_timeline_has_the_load_above_and_the_layouts_below() -> None:
    values = switching_run()
    figure = pictures.of_run(one_run(values))["timeline"]
    above, below = drawn(figure)
    stairs = next(each for each in above.patches if isinstance(each, StepPatch))
    heights, edges, _ = stairs.get_data()
    assert heights @ np.diff(edges) == pytest.approx(len(values["start_times"]))  # every request is in a bin
    assert (above.get_ylabel(), below.get_ylabel()) == ("requests/s sent", "layout")
    assert tick_labels(below) == ["1+1+1+1", "2+2", "4"]
    spans = {str(each.get_label()): each.get_paths()[0].get_extents() for each in below.collections}
    assert {layout: (box.x0, box.x1) for layout, box in spans.items()} == {
        "4": (0.0, 21.0), "1+1+1+1": (21.0, 36.5), "2+2": (36.5, values["duration"]),
    }  # fmt: skip
    for axes in (above, below):
        marks = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in marks] == [21.0, 36.5]
        assert axes.get_xlim() == (0, values["duration"])
    assert "bins of 1 s; 2 switches, the longest gap of a stream at one: 48 ms" in texts(figure)


def test_bins_are_as_wide_as_a_long_run_needs() -> None:
    values = switching_run(start_times=[0.5, 3600.0], duration=3600.0)
    above, _ = drawn(pictures.of_run(one_run(values))["timeline"])
    _, edges, _ = next(each for each in above.patches if isinstance(each, StepPatch)).get_data()
    assert len(edges) - 1 <= pictures.MOST_BINS
    assert edges[-1] >= 3600


def test_a_sweep_has_a_timeline_of_each_run_that_switched() -> None:
    assert list(pictures.of_sweep(sweep_result())) == ["latency", "goodput", "timeline-auto-migrate"]
    several = [name for name in pictures.of_sweep(sweep_result((1.0, 2.0))) if name.startswith("timeline")]
    assert several == ["timeline-auto-migrate-1", "timeline-auto-migrate-2"]


def test_a_run_without_a_timeline_or_start_times_has_none_of_it() -> None:
    assert list(pictures.of_run(one_run(serve_result(layout_timeline=[])))) == ["latency"]
    assert list(pictures.of_run(one_run(serve_result(start_times=[])))) == ["latency"]
    assert pictures.of_run(one_run({"request_throughput": 1.0})) == {}


def test_a_run_is_shown_by_its_tags_too() -> None:
    assert tick_labels(drawn(pictures.of_run(one_run(serve_result()))["latency"])[0]) == ["all requests", "low", "high"]


def test_a_layout_without_a_figure_leaves_a_gap() -> None:
    sweep = sweep_result()
    for percent in ("p50", "median", "p90", "p99"):
        sweep["runs"][0][f"{percent}_tpot_ms"] = None
    line = drawn(pictures.of_sweep(sweep)["latency"])[1].get_lines()[0]
    assert list(np.isnan(np.asarray(line.get_xdata()))) == [True, False, False, False]


def test_a_run_that_answered_nothing_has_its_place_and_no_points() -> None:
    for rates, coordinate in (((4.0,), "get_xdata"), (RATES, "get_ydata")):
        sweep = sweep_result(rates)
        silent = [run for run in sweep["runs"] if run["layout"] == "2+2"]
        for run in silent:
            run.update({key: 0.0 for key in run if key.endswith("_ms") and "ttft" in key}, completed=0)
        axes = drawn(pictures.of_sweep(sweep)["latency"])[0]
        points = np.concatenate([np.asarray(getattr(line, coordinate)(), float) for line in axes.get_lines()])
        assert np.isnan(points).sum() == (len(pictures.PERCENTS) if len(rates) == 1 else len(rates))
        assert np.nanmin(points) > 0
        labels = tick_labels(axes) if len(rates) == 1 else [line.get_label() for line in axes.get_lines()]
        assert labels == ["1+1+1+1", "2+2", "4", "auto, migrate"]


def test_a_tag_that_answered_nothing_has_no_points() -> None:
    result = serve_result()
    zeros = dict.fromkeys(result["by_tag"]["high"], 0.0)
    result["by_tag"]["high"] = {**zeros, "completed": 0, "failed": 5}
    axes = drawn(pictures.of_run(one_run(result))["latency"])[0]
    assert tick_labels(axes) == ["all requests", "low", "high"]
    assert [list(np.isnan(np.asarray(line.get_xdata()))) for line in axes.get_lines()] == [[False, False, True]] * 3


def test_if_no_run_answered_anything_there_is_no_picture_of_latencies() -> None:
    assert "latency" not in pictures.of_run(one_run(serve_result(completed=0, by_tag={})))


def test_every_picture_says_what_it_shows_and_where_that_was_measured() -> None:
    for result in (sweep_result(), sweep_result(RATES)):
        for figure in pictures.of_sweep(result).values():
            assert figure.get_suptitle()
            assert "workload burst" in figure.get_suptitle()
            assert figure.get_supxlabel().replace("\n", " ") == provenance_line(PROVENANCE)


@pytest.mark.slow
def test_names_are_names_and_no_formulas(tmp_path: Path) -> None:
    sweep = sweep_result()
    sweep["workload"] = r"$\undefined{$ <script>"
    sweep["runs"][0]["layout"] = "$$x^$\x00"
    figures = pictures.of_sweep(sweep)
    assert pictures.write(figures, tmp_path, "odd")
    assert r"$\undefined{$ <script>" in texts(figures["latency"])


def test_a_long_name_keeps_its_end() -> None:
    sweep = sweep_result()
    sweep["runs"][0]["layout"] = "maker/" + "x" * 100 + "-70B"
    (label, *_) = tick_labels(drawn(pictures.of_sweep(sweep)["latency"])[0])
    assert label.startswith("...")
    assert label.endswith("-70B")
    assert len(label) < 40


@pytest.mark.slow
def test_pictures_are_written_in_both_formats_and_the_svg_is_the_same_each_time(tmp_path: Path) -> None:
    result = sweep_result()
    once, again = (pictures.write(pictures.of_sweep(result), tmp_path / each, "sweep") for each in ("a", "b"))
    names = [path.name for path in once]
    assert names == [
        "sweep-latency.png", "sweep-latency.svg", "sweep-goodput.png", "sweep-goodput.svg",
        "sweep-timeline-auto-migrate.png", "sweep-timeline-auto-migrate.svg",
    ]  # fmt: skip
    for left, right in zip(once, again, strict=True):
        assert left.read_bytes() == right.read_bytes()
    assert once[0].read_bytes().startswith(b"\x89PNG")
    vector = once[1].read_text()
    assert "<svg" in vector
    assert "<dc:date>" not in vector


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.svg(pictures.of_sweep(sweep_result())["goodput"])
    assert dict(matplotlib.rcParams) == before


def test_runs_of_one_name_are_told_apart_by_row() -> None:
    sweep = sweep_result()
    sweep["runs"].append(sweep["runs"][0])
    assert tick_labels(drawn(pictures.latency(runs_of(sweep), "", ""))[0]).count("1+1+1+1") == 2
