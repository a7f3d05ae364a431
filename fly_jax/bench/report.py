"""``report``: result files as one HTML page with pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fly_jax.bench import pictures
from fly_jax.bench.output_paths import check_file, check_folder
from fly_jax.bench.report_page import Picture, Section, page
from fly_jax.bench.report_tables import tables_of
from fly_jax.bench.result_files import Kind, ResultFile, plain, provenance_line, provenance_of, read
from fly_jax.errors import ConfigError

# What a reader is told of each picture.
CAPTIONS = {
    "latency": "Time to first token, and time per output token after it: half, nine tenths and all but one percent of "
    "the requests were as fast as p50, p90 and p99.",
    "goodput": "Requests a second that kept within the limits of the run, beside all that completed.",
    "timeline": "Requests as they were sent, and the layout that was in force.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turns result files (serve, sweep, switch, kernels, throughput, latency, or any other JSON object) into one "
        "HTML page that needs no other file and no network: tables, pictures, and where each figure comes from. Try: "
        "python -m fly_jax.bench report bench/results/*.json --output report.html"
    )
    parser.set_defaults(command=run)
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT.json", help="result files, in the order that the page shows"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="file of the page (default: %(default)s)"
    )
    parser.add_argument("--title", default="Benchmark results", help="title of the page (default: %(default)s)")
    parser.add_argument(
        "--pictures-dir", type=Path, metavar="DIR", help="also write each picture to this folder, as PNG and as SVG"
    )


def run(options: argparse.Namespace) -> int:
    """Reads all files, then writes the page.

    Raises:
        ConfigError: a file is no result, or the page cannot be written there; one line that says what to do.
    """
    check_file("--output", options.output)
    if options.pictures_dir is not None:
        check_folder("--pictures-dir", options.pictures_dir)
    if options.output.resolve() in [path.resolve() for path in options.results]:
        raise ConfigError(f"--output {options.output} is one of the result files: name another file")
    pictures.require_matplotlib()
    files = [read(path) for path in options.results]
    names = _names(options.results)
    sections = [section(file, name, options.pictures_dir) for file, name in zip(files, names, strict=True)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(plain(options.title), sections), encoding="utf-8")
    print(f"written to {options.output}")
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' own names, since folders are a machine's business; with their folders where names are the same."""
    own = [path.name for path in paths]
    return [plain(name if own.count(name) == 1 else path) for path, name in zip(paths, own, strict=True)]


def section(file: ResultFile, name: str, pictures_dir: Path | None = None) -> Section:
    """One file's part of the page; its pictures are also written to a folder, if there is one."""
    figures = pictures.of_sweep(file.values) if file.kind is Kind.SWEEP else {}
    if file.kind is Kind.SERVE:
        figures = pictures.of_run(file.runs[0])
    if pictures_dir is not None:
        pictures.write(figures, pictures_dir, name.removesuffix(".json").strip("./").replace("/", "-"))
    source = provenance_line(file.values)
    drawn = [Picture(pictures.svg(each), _caption(key), source) for key, each in figures.items()]
    return Section(name, file.kind, provenance_of(file.values), drawn, tables_of(file))


def _caption(name: str) -> str:
    return next(text for key, text in CAPTIONS.items() if name.startswith(key))
