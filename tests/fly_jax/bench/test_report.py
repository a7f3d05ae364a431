"""The page: everything in it, nothing from outside, no markup out of a file."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fly_jax.bench.__main__ import main
from fly_jax.bench.report_tables import MOST_ROWS, of_records, tables_of
from fly_jax.bench.result_files import Kind, ResultFile, kind_of
from tests.fly_jax.bench.sample_results import PROVENANCE, serve_result, sweep_result, switching_run

HOSTILE = "</td><script src='https://evil.example/x.js'>alert(1)</script><img src=x onerror=\"alert(2)\">&amp;$\\frac{$"
SWITCHES = {
    **PROVENANCE,
    "streams": 16,
    "switches": [
        {"source": "4", "target": "2+2", "strategy": "migrate", "runs": [{"cutover_ms": ms} for ms in (3.0, 4.0, 9.0)]}
    ],
}
KERNELS = {**PROVENANCE, "kernels": "8 KV heads", "rows": [{"kind": "decode", "tp": 1, "us": 12.5, "torch_us": None}]}


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images: list[str] = []
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.images += [value or "" for name, value in attrs if tag == "img" and name == "src"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def write(folder: Path, **results: Any) -> list[str]:
    paths = []
    for name, result in results.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result))
        paths.append(str(path))
    return paths


def report(folder: Path, paths: list[str], *more: str) -> str:
    output = folder / "out" / "report.html"
    assert main(["report", *paths, "--output", str(output), *more]) == 0
    return output.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_names_every_file_and_has_its_pictures_and_provenance(tmp_path: Path) -> None:
    other = {"what": "steps of a model", "date": "2026-01-02", "versions": {"jax": "0.10.2"}, "note": {"deep": 7}}
    paths = write(
        tmp_path, sweep=sweep_result(), serve=switching_run(), switch=SWITCHES, kernels=KERNELS, other=other, empty={}
    )
    page = Page(report(tmp_path, paths))
    for path in paths:
        assert page.words.count(Path(path).name) == 2  # in the list and over its section
    assert str(tmp_path) not in page.text
    assert len(page.images) == 5  # three of the sweep, two of the run
    assert page.tags.count("figure") == page.tags.count("figcaption") == 5
    assert page.words.count("2026-01-02 03:04 UTC") == 4  # over each section that states it
    assert page.text.count("fly-jax 0.1.0; jax 0.10.2") == 5  # under each picture
    assert "The file does not state date, versions and machine." in page.text
    assert {"auto, migrate", "migrate", "decode", "steps of a model", "note deep".replace(" ", ".")} <= set(page.words)


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = report(tmp_path, write(tmp_path, sweep=sweep_result(), serve=serve_result()))
    page = Page(text)
    assert page.addresses
    assert all(each.startswith(("data:image/svg+xml;base64,", "#")) for each in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    for each in page.images:
        vector = ElementTree.fromstring(base64.b64decode(each.split(",", 1)[1]))
        links = [value for node in vector.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = dict.fromkeys(("model_id", "layout", "policy", "strategy", "date", "host", HOSTILE), HOSTILE)
    sweep = {**sweep_result(), "workload": HOSTILE, **hostile}
    sweep["runs"][0].update(hostile)
    serve = serve_result(**hostile, by_tag={HOSTILE: serve_result()}, layout_timeline=[{"at": 0, "layout": HOSTILE}])
    rows = {"rows": [{HOSTILE: HOSTILE}]}
    paths = write(tmp_path, sweep=sweep, serve=serve, rows=rows, **{"<b>": {}})
    page = Page(report(tmp_path, paths, "--title", HOSTILE))
    assert not {"script", "b"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert all(each.startswith(("data:", "#")) for each in page.addresses)
    assert "alert(1)" in page.text
    assert "<b>.json" in page.words
    assert len(page.images) == page.tags.count("img")


@pytest.mark.parametrize(
    "values",
    [
        {"runs": [{}]},
        {"runs": [{"layout": None, "layout_timeline": "x", "start_times": 3, "by_tag": []}]},
        {"request_throughput": None, "by_tag": {"a": None, "b": {}}, "start_times": ["x"], "layout_timeline": [{}]},
        {"switches": [{"runs": None}, {"runs": [{"ms": "x"}, {}]}]},
        {"rows": [{"a": {"b": {"c": 1}}}, {"d": [1]}, {"e": True, "f": 10**400}]},
        {"a": "\ud800", "b": "\x00"},
        {"request_throughput": 1.0, "switch_stall_ms": [None, 10**400], **switching_run(duration=None)},
    ],
)
def test_files_with_parts_missing_or_wrong_are_still_shown(tmp_path: Path, values: dict[str, Any]) -> None:
    assert "odd.json" in report(tmp_path, write(tmp_path, odd=values))


@pytest.mark.slow
def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    paths = write(tmp_path, sweep=sweep_result())
    assert report(tmp_path, paths) == report(tmp_path, paths)


@pytest.mark.slow
def test_files_of_one_name_are_told_apart_by_folder(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths += write(tmp_path / folder, sweep=sweep_result())
    page = Page(report(tmp_path, paths, "--pictures-dir", str(tmp_path / "pictures")))
    assert all(path in page.words for path in paths)
    assert len(list((tmp_path / "pictures").iterdir())) == 2 * 2 * 3


def test_pictures_are_written_beside_the_page_when_asked_for(tmp_path: Path) -> None:
    report(tmp_path, write(tmp_path, burst=serve_result()), "--pictures-dir", str(tmp_path / "pictures"))
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["burst-latency.png", "burst-latency.svg", "burst-timeline.png", "burst-timeline.svg"]


def test_a_sweep_is_compared_run_by_run() -> None:
    sweep = sweep_result()
    table = tables_of(ResultFile("x.json", Kind.SWEEP, sweep))[0]
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    assert [row["run"] for row in rows] == ["1+1+1+1", "2+2", "4", "auto, migrate"]
    assert rows[1]["TTFT p99 ms"] == f"{sweep['runs'][1]['p99_ttft_ms']:,.4g}"
    assert (rows[3]["switches"], rows[3]["worst stall ms"], rows[3]["schedule lag p99 ms"]) == ("2", "48", "1.5")
    assert dict(zip(table.headings, table.numeric, strict=True))["TTFT p99 ms"]
    assert not table.numeric[0]
    assert table.title == "Runs"
    for run in sweep["runs"]:
        run["goodput_limits_ms"] = {"ttft": 500.0}
    assert tables_of(ResultFile("x.json", Kind.SWEEP, sweep))[0].title == "Runs; goodput: TTFT 500 ms"


def test_a_run_that_answered_nothing_shows_its_counts_and_no_latencies() -> None:
    sweep = sweep_result()
    sweep["runs"][1].update(completed=0, failed=7, p50_ttft_ms=0.0, median_ttft_ms=0.0)
    table = tables_of(ResultFile("x.json", Kind.SWEEP, sweep))[0]
    row = dict(zip(table.headings, table.rows[1], strict=True))
    assert (row["completed"], row["failed"], row["switches"]) == ("0", "7", "0")
    assert {row[heading] for heading in table.headings if heading.startswith(("TTFT", "TPOT"))} == {""}
    assert "" not in {row[table.headings.index("TTFT p50 ms")] for row in table.rows[2:]}


def test_a_tag_that_answered_nothing_is_named_without_latencies() -> None:
    result = serve_result()
    zeros = dict.fromkeys(result["by_tag"]["high"], 0.0)
    result["by_tag"]["high"] = {**zeros, "completed": 0, "failed": 5}
    result["by_tag"]["low"]["completed"] = 3
    rows = {row[:2]: row[2:] for row in tables_of(ResultFile("x.json", Kind.SERVE, result))[0].rows}
    assert set(rows["TTFT", "high"]) == {""}
    assert "" not in {rows["TTFT", name][1] for name in ("all", "low")}
    result["completed"] = 0
    table, totals = tables_of(ResultFile("x.json", Kind.SERVE, result))
    assert set(next(row for row in table.rows if row[:2] == ("TTFT", "all"))[2:]) == {""}
    assert not [key for key, _ in totals.rows if key.endswith("ttft_ms")]
    assert ("completed", "0") in totals.rows


def test_switches_are_shown_by_their_medians() -> None:
    table = tables_of(ResultFile("x.json", Kind.SWITCH, SWITCHES))[0]
    assert table.headings == ("source", "target", "strategy", "times", "cutover ms")
    assert table.rows == (("4", "2+2", "migrate", "3", "4"),)


def test_what_is_unknown_is_a_table_of_its_scalars() -> None:
    values = {**PROVENANCE, "answer": 42, "ratio": 0.12345, "none": None, "list": [1], "of": {"x": True}}
    (table,) = tables_of(ResultFile("x.json", kind_of(values), values))
    assert table.rows == (("answer", "42"), ("ratio", "0.1235"), ("none", ""), ("of.x", "True"))


def test_a_long_table_says_that_it_is_cut() -> None:
    table = of_records("Figures", [{"n": n} for n in range(MOST_ROWS + 7)])
    assert len(table.rows) == MOST_ROWS
    assert table.title == f"Figures (the first {MOST_ROWS} of {MOST_ROWS + 7})"


def test_wrong_paths_are_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write(tmp_path, serve=serve_result())
    for given, message in (
        ([path, "--output", str(tmp_path)], "is a folder: name a file in it"),
        ([path, "--output", path], "is one of the result files"),
        ([path, "--output", f"{path}/x.html"], "is a file"),
        ([path, "--output", str(tmp_path / "r.html"), "--pictures-dir", path], "is a file"),
        ([path, str(tmp_path / "gone.json"), "--output", str(tmp_path / "r.html")], "cannot be read"),
    ):
        assert main(["report", *given]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [each.name for each in tmp_path.iterdir()] == ["serve.json"]
