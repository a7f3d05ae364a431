"""Reading result files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fly_jax.bench.result_files import (
    Kind,
    LayoutChange,
    ResultFile,
    kind_of,
    number,
    plain,
    provenance_line,
    read,
    runs_of,
    short_layout,
)
from fly_jax.errors import ConfigError
from tests.fly_jax.bench.sample_results import PROVENANCE, serve_result, sweep_result, switching_run


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (sweep_result(), Kind.SWEEP),
        (serve_result(), Kind.SERVE),
        ({"switches": [{"source": "4", "runs": []}]}, Kind.SWITCH),
        ({"rows": [{"layout": "4", "elapsed_time": 1.0}]}, Kind.ROWS),
        ({"rows": "none"}, Kind.OTHER),
        ({"runs": [], "rows": [1, 2]}, Kind.OTHER),
        ({}, Kind.OTHER),
    ],
)
def test_a_file_is_known_by_its_keys(values: dict[str, Any], kind: Kind) -> None:
    assert kind_of(values) is kind


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"[1]", "holds no JSON object but a list"), (b"\xff\xfe", "is not JSON")],
)
def test_what_is_no_result_is_one_line_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read \(No such file or directory\)"):
        read(tmp_path / "gone.json")


def test_a_file_is_read_with_the_special_numbers_of_python(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    path.write_text(json.dumps(serve_result(request_rate=math.inf, p99_tpot_ms=math.nan)))
    file = read(path)
    (run,) = file.runs
    assert (file.name, file.kind) == ("serve.json", Kind.SERVE)
    assert run.rate == math.inf
    assert math.isnan(run.percentile("tpot", 99))


def test_runs_are_named_by_layout_or_by_policy_and_strategy() -> None:
    assert [run.name for run in runs_of(sweep_result())] == ["1+1+1+1", "2+2", "4", "auto, migrate"]
    of_another_server = serve_result(layout_timeline=[])
    assert ResultFile("x.json", Kind.SERVE, of_another_server).runs[0].name == "demo"


def test_a_median_is_a_p50_where_there_is_no_other() -> None:
    values = {"request_throughput": 1.0, "median_ttft_ms": 12.0, "p99_ttft_ms": 40.0}
    (run,) = ResultFile("x.json", Kind.SERVE, values).runs
    assert (run.percentile("ttft", 50), run.percentile("ttft", 99)) == (12.0, 40.0)
    assert math.isnan(run.percentile("ttft", 90))


def test_changes_are_the_entries_of_a_timeline_that_differ_from_the_one_before() -> None:
    timeline = [{"at": 5.0, "layout": "4"}, {"at": 0.0, "layout": "2+2"}, {"at": 3.0, "layout": "2+2"}]
    (run,) = ResultFile("x.json", Kind.SERVE, switching_run(layout_timeline=timeline)).runs
    assert run.changes == (LayoutChange(5.0, "4"),)


@pytest.mark.parametrize("value", [None, True, "fast", [], {}, 10**400])
def test_what_is_no_number_is_nan(value: object) -> None:
    assert math.isnan(number(value))


def test_labels_are_one_printable_line_of_bounded_length() -> None:
    assert plain("a\nb\x00\u202e\ud800c") == "a?b???c"
    assert len(plain("x" * 10**5)) < 500


@pytest.mark.parametrize(
    ("layout", "short"),
    [("1+1+1+1", "1+1+1+1"), ("1+1+1+1+1+1+1+1", "8x1"), ("4+1+1+1+1", "4+1+1+1+1"), ("2+1+1+1+1+1+1", "2+6x1")],
)
def test_only_long_layouts_are_shortened(layout: str, short: str) -> None:
    assert short_layout(layout) == short


def test_provenance_is_one_line_whatever_form_a_file_has() -> None:
    line = provenance_line(PROVENANCE)
    assert line.startswith("2026-01-02 03:04 UTC; fly-jax 0.1.0; jax 0.10.2")
    assert line.endswith("x86_64, 2 cores")
    nested = provenance_line({"date": "2026-01-02", "versions": {"jax": "0.10.2"}, "machine": "2 cores", "rows": []})
    assert nested == "2026-01-02; jax 0.10.2; 2 cores"
    assert provenance_line({}) == "date, versions and machine not stated"
